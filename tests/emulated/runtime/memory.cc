#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

namespace dpcomm::emulated {
namespace {

constexpr int kPageBits = 10;

bool starts_after(const void* place, const Region& region) {
  return static_cast<const char*>(place) < region.base;
}

}  // namespace

void MemoryMap::add(Region region) {
  const auto after = std::upper_bound(regions_.begin(), regions_.end(), region.base, starts_after);
  const bool over_next = after != regions_.end() && region.base + region.bytes > after->base;
  const bool over_previous =
      after != regions_.begin() && (after - 1)->base + (after - 1)->bytes > region.base;
  if (over_next || over_previous) throw std::logic_error("regions overlap: " + region.name);
  regions_.insert(after, std::move(region));
  for (Cached& cached : cache_) cached = Cached();
}

void MemoryMap::remove(const void* base) {
  std::erase_if(regions_, [=](const Region& region) { return region.base == base; });
  for (Cached& cached : cache_) cached = Cached();
}

const Region* MemoryMap::find(const void* place, size_t size) const {
  const uintptr_t page = reinterpret_cast<uintptr_t>(place) >> kPageBits;
  Cached& cached = cache_[page % kCached];
  if (cached.page == page && cached.index < regions_.size() &&
      regions_[cached.index].holds(place, size)) {
    return &regions_[cached.index];
  }
  const auto after = std::upper_bound(regions_.begin(), regions_.end(), place, starts_after);
  if (after == regions_.begin() || !(after - 1)->holds(place, size)) return nullptr;
  cached = Cached{page, static_cast<size_t>(after - regions_.begin() - 1)};
  return &*(after - 1);
}

std::string MemoryMap::describe(const void* place, uint64_t value) const {
  char text[64];
  const Region* region = find(place, 1);
  if (region == nullptr) {
    std::snprintf(text, sizeof text, "%p (in no region)", place);
    return text;
  }
  const size_t offset = static_cast<const char*>(place) - region->base;
  std::string named = region->describe ? region->describe(offset, value) : std::string();
  if (!named.empty()) return named;
  std::snprintf(text, sizeof text, " + %zu", offset);
  return region->name + text;
}

}  // namespace dpcomm::emulated
