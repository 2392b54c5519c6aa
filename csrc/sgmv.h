// A segment of the segmented low-rank product (minift/ops/sgmv.py) as the kernels of every device see it.

#pragma once

#include <cstdint>

namespace minift {

// Tokens [begin, end) with rows [first, first + rank) of A and B; none of them is empty.
struct SgmvSegment {
  int32_t begin, end, first, rank;
};

}  // namespace minift
