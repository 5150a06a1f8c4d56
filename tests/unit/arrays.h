// Arrays in files, as on_cpu.py writes and reads them.
#pragma once

#include <cstring>
#include <fstream>
#include <string>
#include <vector>

template <typename V>
std::vector<V> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  std::vector<V> out(bytes.size() / sizeof(V));
  memcpy(out.data(), bytes.data(), bytes.size());
  return out;
}
template <typename V>
void write(const std::string& path, const std::vector<V>& values) {
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(V));
}
