"""What compression costs in answers: loss, agreement and tasks of real engines (``hierasparse evaluate``)."""
