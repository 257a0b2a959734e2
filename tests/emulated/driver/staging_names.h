// What lies at an offset of a rank's staging, in words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/layout.h"

namespace dpcomm::emulated {

/// "arrival of 0->1, lane 0, cta 2, slot 1: message 5"; empty for what is no flag and no packet.
std::string name_in_staging(const StagingLayout& layout, int rank, size_t offset, uint64_t value);

}  // namespace dpcomm::emulated
