// A file in memory. A file that is cut short while it is mapped has no bytes for some of the addresses, and reading
// there raises SIGBUS, which would end the process.
#pragma once
#include <cstdint>

namespace lift_fast {

struct MappedRange;

// A private, writable map of a file's first bytes. When a part of it cannot be read, the whole of it becomes zeros and
// lost() true, for good.
class Mapping {
 public:
  // Throws std::system_error when the operating system refuses. The descriptor is not needed afterwards.
  Mapping(int file, int64_t bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  bool lost() const;

 private:
  void* data_;
  int64_t bytes_;
  MappedRange* range_;
};

// How many times a mapping of this process was lost. As long as it stays the same, all that was read was the files'.
int64_t lost_mappings();

// Makes this module's handler the first to see SIGBUS. Other libraries install theirs at any time (faulthandler,
// DataLoader workers), so a reader of a mapping calls this before.
void handle_bus_errors();

}  // namespace lift_fast
