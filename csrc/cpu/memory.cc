#include "cpu/memory.h"

#include <sys/mman.h>

#include <new>

namespace pyllm::cpu {
namespace {
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kPage = 4096;
}  // namespace

Buffer::Buffer(int64_t bytes) : bytes_(bytes) {
  if (bytes < 0) throw std::bad_alloc();
  const bool huge = size_t(bytes) >= kHugePage;
  mapped_ = (size_t(bytes) + kPage) / kPage * kPage + (huge ? kHugePage : 0);
  mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  auto address = reinterpret_cast<uintptr_t>(mapping_);
  if (huge) {
    address = (address + kHugePage - 1) / kHugePage * kHugePage;
    (void)madvise(reinterpret_cast<void*>(address), size_t(bytes), MADV_HUGEPAGE);  // a wish, not a need
  }
  data_ = reinterpret_cast<void*>(address);
}

Buffer::~Buffer() { munmap(mapping_, mapped_); }

}  // namespace pyllm::cpu
