#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <isobath/core/tensor_memory.hpp>
#include <list>
#include <mutex>
#include <unordered_map>

namespace isobath {
namespace {

/// Steps of a pass that peak at different times would else unmap each other's tensors in turn.
constexpr int64_t kSlack = 16;

/// Mappings are multiples of this, so that tensors of nearly one size share theirs.
constexpr size_t kGranularity = size_t{1} << 16;

size_t mapped_size(size_t n_bytes) {
  return (n_bytes + kGranularity - 1) / kGranularity * kGranularity;
}

/// Mappings by size; the caller locks.
class Mappings {
 public:
  /// nullptr: the system has none.
  void* take(size_t size) {
    if (void* kept = take_kept(size)) return kept;
    make_room(size);
    void* data = map(size);
    if (data == nullptr) {
      unmap_kept();
      data = map(size);
    }
    if (data != nullptr) grow(data, size);
    return data;
  }

  /// False: not one of these.
  bool give_back(void* data) {
    const auto found = live_.find(data);
    if (found == live_.end()) return false;
    const size_t size = found->second;
    live_.erase(found);
    memory_.live_bytes -= static_cast<int64_t>(size);
    memory_.kept_bytes += static_cast<int64_t>(size);
    kept_.push_back({data, size});
    by_size_[size].push_back(std::prev(kept_.end()));
    return true;
  }

  void unmap_kept() {
    while (!kept_.empty()) unmap_oldest();
    memory_.peak_bytes = memory_.live_bytes;
  }

  [[nodiscard]] const TensorMemory& memory() const { return memory_; }

 private:
  struct Kept {
    void* data;
    size_t size;
  };
  using Place = std::list<Kept>::iterator;

  void grow(void* data, size_t size) {
    live_.emplace(data, size);
    memory_.live_bytes += static_cast<int64_t>(size);
    memory_.peak_bytes = std::max(memory_.peak_bytes, memory_.live_bytes);
  }

  // The youngest of its size, whose pages are likeliest in a cache.
  void* take_kept(size_t size) {
    const auto found = by_size_.find(size);
    if (found == by_size_.end() || found->second.empty()) return nullptr;
    const Place place = found->second.back();
    found->second.pop_back();
    void* data = place->data;
    kept_.erase(place);
    memory_.kept_bytes -= static_cast<int64_t>(size);
    grow(data, size);
    return data;
  }

  void make_room(size_t size) {
    const int64_t live = memory_.live_bytes + static_cast<int64_t>(size);
    const int64_t peak = std::max(memory_.peak_bytes, live), most = peak + peak / kSlack;
    while (!kept_.empty() && live + memory_.kept_bytes > most) unmap_oldest();
  }

  void unmap_oldest() {
    const Kept oldest = kept_.front();
    by_size_[oldest.size].pop_front();  // of one size, too, the oldest stands first
    kept_.pop_front();
    memory_.kept_bytes -= static_cast<int64_t>(oldest.size);
    munmap(oldest.data, oldest.size);
  }

  static void* map(size_t size) {
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    madvise(data, size, MADV_HUGEPAGE);  // refused where there are none: small pages do
    return data;
  }

  std::unordered_map<void*, size_t> live_;
  std::list<Kept> kept_;  // the oldest first
  std::unordered_map<size_t, std::deque<Place>> by_size_;
  TensorMemory memory_{0, 0, 0};
};

class TensorAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n_bytes) override {
    void* data = nullptr;
    if (n_bytes >= static_cast<size_t>(kMappedBytes)) {
      const std::lock_guard lock(mutex_);
      data = mappings_.take(mapped_size(n_bytes));
    }
    if (data == nullptr) data = c10::alloc_cpu(n_bytes);  // throws, with the size, where there is no memory
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  [[nodiscard]] c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n_bytes) const override {
    default_copy_data(to, from, n_bytes);
  }

  [[nodiscard]] TensorMemory memory() {
    const std::lock_guard lock(mutex_);
    return mappings_.memory();
  }
  void unmap_kept() {
    const std::lock_guard lock(mutex_);
    mappings_.unmap_kept();
  }

  /// Never destroyed: tensors may go after static objects did.
  static TensorAllocator& one() {
    static auto* const allocator = new TensorAllocator;
    return *allocator;
  }

 private:
  static void release(void* data) {
    TensorAllocator& self = one();
    {
      const std::lock_guard lock(self.mutex_);
      if (self.mappings_.give_back(data)) return;
    }
    c10::free_cpu(data);
  }

  std::mutex mutex_;
  Mappings mappings_;
};

}  // namespace

void map_tensors() {
  c10::SetCPUAllocator(&TensorAllocator::one(), /*priority=*/1);
}

TensorMemory tensor_memory() {
  return TensorAllocator::one().memory();
}

void unmap_kept_tensors() {
  TensorAllocator::one().unmap_kept();
}

}  // namespace isobath
