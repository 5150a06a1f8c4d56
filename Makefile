# Everything runs from a bare checkout with Python 3.11 and its venv: the first target that needs it makes .venv.
PYTHON ?= python3
VENV   := .venv/bin/python
MODEL  := .cache/smollm2-135m-instruct
TEXT   := .cache/text.txt
ARGS   ?=

# Images for containers like to set this; vLLM's thousands of modules would then be compiled in every process.
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help env data demo test lint clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 8

# The scripts behind these two look at stamps and return at once when there is nothing to do.
env:  ## make .venv: vLLM (CUDA if there is a GPU, else CPU), this plugin, the development tools
	@$(PYTHON) tools/setup_env.py

data: env  ## fetch the small model and the long text that demo and tests use
	@$(VENV) tools/smollm2.py $(MODEL)
	@$(VENV) tools/text.py $(TEXT)

demo: data  ## serve the model with a compressed KV cache, ask it about a long document, show what it saved
	@$(VENV) tools/demo.py

# Two at a time, since a test has one thread; a file's tests in one process, which share its engines.
test: data  ## run the tests; ARGS="-k page -x" is passed on to pytest, "-n 0" runs them one by one
	$(VENV) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: env  ## check the code with ruff
	$(VENV) -m ruff check .

clean:  ## remove everything that these targets made
	rm -rf .venv .cache build dist *.egg-info hierasparse_vllm/_C*.so .pytest_cache .hypothesis .ruff_cache
