// Large zeroed buffers on huge pages where the system grants them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pyllm::cpu {

class Buffer {
 public:
  // Throws std::bad_alloc. Memory is zero and is taken from the system as it is first touched.
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* mapping_;
  size_t mapped_;
  void* data_;
  int64_t bytes_;
};

}  // namespace pyllm::cpu
