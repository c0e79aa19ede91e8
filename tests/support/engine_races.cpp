// Races in csrc/rows, for ThreadSanitizer, without Python: threads gather and find while others write to the index, map
// shards anew and cut files. Prints how many calls gave right rows and how many an error.
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/scratch.h"
#include "rows/dequant.h"
#include "rows/mapping.h"
#include "rows/table.h"

using namespace lift_fast;

constexpr int64_t kShards = 8, kRows = 64, kDim = 256, kAll = kShards * kRows, kWanted = 2000;

int main(int, char** arguments) {
  const std::string folder = arguments[1];
  std::vector<int64_t> starts;
  for (int64_t k = 0; k <= kShards; ++k) starts.push_back(k * kRows);
  Table table(Codec::int8, kDim, Starts(starts));
  KeyTable keys{Starts(starts)};
  std::vector<std::unique_ptr<Mapping>> shards(kShards);
  const auto path = [&](int64_t k) { return folder + "/" + std::to_string(k); };
  const auto map = [&](int64_t k) {  // row r of the table: kDim bytes of r % 120 + 1
    std::vector<uint8_t> bytes;
    for (int64_t r = k * kRows; r < (k + 1) * kRows; ++r) bytes.insert(bytes.end(), kDim, r % 120 + 1);
    unlink(path(k).c_str());
    const int file = open(path(k).c_str(), O_RDWR | O_CREAT, 0600);
    if (write(file, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) std::abort();
    shards[k] = std::make_unique<Mapping>(file, bytes.size());
    close(file);
    table.map(k, shards[k]->data(), nullptr);
  };
  std::vector<int64_t> hashes(kAll);
  for (int64_t r = 0; r < kAll; ++r) hashes[r] = r * 0x9e3779b97f4a7c15;
  for (int64_t k = 0; k < kShards; ++k) {
    map(k);
    keys.map(k, &hashes[k * kRows]);
  }

  std::vector<int64_t> index(kWanted);
  std::atomic<bool> ended{false};
  std::atomic<int64_t> right{0}, errors{0}, wrong{0};
  std::shared_mutex& mutex = table.lock().get();
  const auto gather = [&] {
    while (!ended) {
      const Scratch out(kWanted * kDim);
      const auto* rows = reinterpret_cast<const uint8_t*>(out.get());
      bool lost = false;
      std::this_thread::sleep_for(std::chrono::microseconds(200));  // else who waits for the lock alone never has it
      try {
        const std::shared_lock<std::shared_mutex> lock(mutex);
        table.gather(index.data(), kWanted, out.get(), nullptr, Element::codes, false, 2, best_isa());
        table.advise(index.data(), kWanted);
        table.touched();
        for (const auto& shard : shards) lost = lost || shard->lost();
      } catch (const std::exception&) {
        ++errors;
        continue;
      }
      bool same = true;
      for (int64_t i = 0; i < kWanted; ++i) same = same && rows[i * kDim] && rows[i * kDim] == rows[i * kDim + kDim - 1];
      ++(same ? right : lost ? errors : wrong);
    }
  };
  const auto find = [&] {
    std::vector<int64_t> found(kAll);
    std::shared_mutex& own = keys.lock().get();
    while (!ended) {
      {
        const std::unique_lock<std::shared_mutex> lock(own);
        keys.map(0, hashes.data());
        keys.build();
      }
      const std::shared_lock<std::shared_mutex> lock(own);
      keys.find(hashes.data(), kAll, found.data());
      for (int64_t r = 0; r < kAll; ++r) wrong += found[r] != r;
    }
  };
  const auto widen = [&] {
    std::vector<uint8_t> codes(kAll * kDim, 3);
    std::vector<float> scales(kAll, 1), out(kWanted * kDim);
    while (!ended) {
      try {
        dequant_cpu({codes.data(), scales.data(), index.data(), out.data(), kAll, kWanted, kDim, kDim, 1, Codec::int8,
                     Element::f32, false}, 2, best_isa());
        for (const float x : out) wrong += x != 3;
      } catch (const std::out_of_range&) {
        ++errors;
      }
    }
  };
  const auto change = [&] {
    for (int64_t turn = 0; !ended; ++turn)
      for (int64_t i = 0; i < kWanted; ++i) index[i] = turn % 20 ? (turn + i) % kAll : (int64_t{1} << 62) - turn;
  };
  const auto remap = [&] {
    for (int64_t turn = 0; !ended; ++turn) {
      const int64_t k = turn % kShards;
      if (turn % 3 == 0 && truncate(path(k).c_str(), 0) != 0) std::abort();
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      const std::unique_lock<std::shared_mutex> lock(mutex);
      map(k);
    }
  };
  std::vector<std::thread> threads;
  for (int k = 0; k < 3; ++k) threads.emplace_back(gather);
  threads.emplace_back(find);
  threads.emplace_back(widen);
  threads.emplace_back(change);
  threads.emplace_back(remap);
  std::this_thread::sleep_for(std::chrono::seconds(5));
  ended = true;
  for (auto& thread : threads) thread.join();
  release_scratch();
  std::printf("%ld right, %ld errors, %ld wrong, %ld lost\n", long(right), long(errors), long(wrong),
              long(lost_mappings()));
  return wrong ? 1 : 0;
}
