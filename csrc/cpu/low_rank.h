// What low_rank.cpp tells its kernels. Strides are in elements, panels are those of `pack_panel`.

#pragma once

#include <cstdint>

namespace minift {

constexpr int64_t LOW_RANK_ROWS = 8;      // that kernels take at once
constexpr int64_t LOW_RANK_PADDING = 32;  // panels have a multiple of so many columns: of two vectors
constexpr int64_t GRADIENT_STRIP = 64;    // columns of a wide matrix whose gradient is summed up in cache
constexpr int64_t GRADIENT_TOKENS = 64;   // of a strip that are packed at a time

// Rows of `length` elements times a panel.
struct LowRankProduct {
  const Bf16* rows;
  int64_t stride, length;
  const uint32_t* panel;
};

// out = bias + scale * the sum of the products; `width` columns of panels that are wider by their padding.
struct LowRankSum {
  const LowRankProduct* products;
  int64_t num_products, panel_width, width;
  float scale;
  const Bf16* bias;  // may be null
  Bf16* out;
  int64_t out_stride;
};

}  // namespace minift
