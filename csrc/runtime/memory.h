// Memory that is mapped once, in large pages where the system has them, and touched only as far as it is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include <sys/mman.h>

namespace gossamer {

class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) : bytes_(bytes) {
    if (!bytes) return;
    constexpr size_t huge = size_t{1} << 21;
    mapped_ = bytes + (bytes >= huge ? huge : 0);
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) {
      base_ = nullptr;
      throw std::bad_alloc();
    }
    data_ = base_;
    if (bytes >= huge) {
      data_ = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(base_) + huge - 1) / huge * huge);
#ifdef MADV_HUGEPAGE
      madvise(data_, bytes / huge * huge, MADV_HUGEPAGE);  // the rest would waste most of a page
#endif
    }
  }
  ~Memory() {
    if (base_) munmap(base_, mapped_);
  }
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void swap(Memory& other) {
    std::swap(base_, other.base_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
  }
  void* base_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0, mapped_ = 0;
};

// Part of a mapping that others have parts of too: layers are smaller than the large pages they should stand in.
class SharedMemory {
 public:
  SharedMemory() = default;
  // `alone`: a mapping of its own, whose memory is free as soon as this is gone.
  explicit SharedMemory(size_t bytes, bool alone = false) : bytes_(bytes) {
    constexpr size_t chunk = size_t{32} << 20;
    static std::mutex mutex;
    static std::shared_ptr<Memory> open;
    static size_t used = 0;
    const size_t rounded = (bytes + 127) / 128 * 128;
    if (alone || rounded > chunk / 2) {
      owner_ = std::make_shared<Memory>(rounded);
      data_ = owner_->as<uint8_t>();
      return;
    }
    std::lock_guard lock(mutex);
    if (!open || used + rounded > chunk) {
      open = std::make_shared<Memory>(chunk);
      used = 0;
    }
    owner_ = open;
    data_ = open->as<uint8_t>() + used;
    used += rounded;
  }
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<Memory> owner_;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace gossamer
