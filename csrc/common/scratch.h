// Scratch memory that is reused from call to call.
#pragma once
#include <cstdint>
#include <utility>

namespace lift_fast {

// Uninitialised memory, which goes back to a pool (256 MiB at most) when the object dies; release_scratch() empties it.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t bytes);  // throws std::bad_alloc
  Scratch(Scratch&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Scratch();
  float* get() const { return static_cast<float*>(data_); }
  float& operator[](int64_t i) const { return get()[i]; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

inline Scratch scratch_floats(int64_t count) { return Scratch(count * static_cast<int64_t>(sizeof(float))); }

void release_scratch();

}  // namespace lift_fast
