// How the terms of a low-rank op become the work of blocks.
//
// A term's ranks are cut into tiles of TILE; tiles of one wide matrix are a group. Lanes load their part of a wide
// matrix straight into registers, in the layout of the tensor cores (tensor_cores.h), and so they store it: through
// shared memory goes only what all warps of a block need.

#pragma once

#include "elements.h"
#include "launch.h"
#include "low_rank_kernels.h"

#include <algorithm>

namespace minift::cuda::low_rank {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int TILE = RANK_TILE;
constexpr int GROUP = 4;    // tiles that a block takes at once
constexpr int CHUNK = 256;  // columns or tokens that it takes at once

// Up to TILE ranks of a term.
struct RankTile {
  Bf16* narrow;
  const Bf16* factor;
  int64_t narrow_stride, factor_stride;
  float scale;
  int ranks;
  bool ranks_adjacent;
};

// Tiles that share a wide matrix.
struct Group {
  Wide wide;
  int first_tile, num_tiles;
  const Bf16* bias;  // of from_rank; may be null
};

// An argument of a kernel, which is at most 4 KB.
struct Work {
  static constexpr int MOST_TILES = 48, MOST_GROUPS = 32;

  RankTile tiles[MOST_TILES];
  Group groups[MOST_GROUPS];
  int num_tiles, num_groups;
  int64_t tokens;
  // Of to_rank. sums: for each split as many as there are elements in `narrow`; null if there is one split.
  int64_t splits, columns_of_split, split_stride;
  float* sums;
  const Bf16* narrow;
  int row_blocks;  // how often there are the tokens of a block
  // Of from_rank: columns that a block takes, and how often the widest matrix has so many.
  int columns_of_block, column_blocks;
};
static_assert(sizeof(Work) <= 3900);

// Whether every access to these rows can be a whole pack.
inline bool in_packs(const Bf16* data, int64_t stride, int64_t width) {
  return aligned(data) && stride % PACK == 0 && width % PACK == 0;
}

inline int64_t blocks_of(int64_t length, int64_t size) { return (length + size - 1) / size; }

// Whether every access can be a whole pack.
inline bool vectors(const std::vector<LowRankGroup>& groups) {
  bool all = true;
  for (const LowRankGroup& group : groups) {
    all &= in_packs(group.wide.data, group.wide.stride, group.wide.width);
    all &= group.bias == nullptr || aligned(group.bias);
    for (const LowRankTerm& term : group.terms) {
      all &= in_packs(term.factor, term.factor_stride, term.rank);
      all &= in_packs(term.narrow, term.narrow_stride, term.rank);
    }
  }
  return all;
}

inline int64_t widest_of(const std::vector<LowRankGroup>& groups) {
  int64_t widest = 0;
  for (const LowRankGroup& group : groups) widest = std::max(widest, group.wide.width);
  return widest;
}

// visit(tile) for the ranks of a term, TILE at a time.
template <class Visit>
void for_each_tile(const LowRankTerm& term, const Visit& visit) {
  for (int64_t rank = 0; rank < term.rank; rank += TILE) {
    const Bf16* factor = term.factor + rank * (term.ranks_adjacent ? 1 : term.factor_stride);
    int ranks = static_cast<int>(std::min<int64_t>(TILE, term.rank - rank));
    visit(RankTile{term.narrow + rank, factor, term.narrow_stride, term.factor_stride, term.scale, ranks,
                   term.ranks_adjacent});
  }
}

// run(work) with the groups, cut where they have more than `most_tiles` tiles, as often as it takes.
template <class Run>
void for_each_work(const std::vector<LowRankGroup>& groups, int64_t tokens, int64_t most_tiles, const Run& run) {
  Work work{};
  auto flush = [&] {
    work.tokens = tokens;
    run(work);
    work = Work{};
  };
  for (const LowRankGroup& group : groups) {
    std::vector<RankTile> tiles;
    for (const LowRankTerm& term : group.terms) for_each_tile(term, [&](RankTile tile) { tiles.push_back(tile); });
    int64_t end = tiles.size();
    for (int64_t first = 0; first < end; first += most_tiles) {
      int64_t count = std::min(most_tiles, end - first);
      if (work.num_groups == Work::MOST_GROUPS || work.num_tiles + count > Work::MOST_TILES) flush();
      work.groups[work.num_groups++] = {group.wide, work.num_tiles, static_cast<int>(count), group.bias};
      for (int64_t t = first; t < first + count; ++t) work.tiles[work.num_tiles++] = tiles[t];
    }
  }
  if (work.num_tiles > 0) flush();
}

}  // namespace minift::cuda::low_rank
