// Causal attention over packed documents: what attention.cpp hands to the kernels.

#pragma once

#include <cstdint>

namespace minift {

// A block of queries has so many lanes (query tokens times heads of a key head), unless one token has more; it meets
// so many keys at once.
constexpr int64_t ATTENTION_LANES = 192, ATTENTION_KEYS = 64;

// (tokens, heads, E) in memory; the elements of one head are adjacent.
template <class T>
struct Heads {
  T* data;
  int64_t token_stride, head_stride;

  T* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

// E, query heads, query heads to a key head, how many keys back a query sees, its own included, and how many rows of
// the keys are shared: the first ones, which every document has before its own.
struct AttentionShape {
  int64_t dim, heads, group, window, shared;
  int64_t most_keys;  // of a chunk, for the scratch of backward
};

// Query tokens [first, last) of one document, worked on together. Query t is key t + shift; the document's keys, or
// the chunk of them that is asked for, are [first_key, last_key). Its own keys have the numbers of their rows, from
// own_key on; the shared ones are numbered as if they stood right before.
struct QueryBlock {
  int64_t first, last, shift, first_key, last_key, own_key;
};

// The `index`-th of a document's or chunk's queries cut into even blocks; `count` of them.
inline int64_t num_query_blocks(int64_t queries, int64_t group) {
  int64_t most = group > ATTENTION_LANES ? 1 : ATTENTION_LANES / group;
  return (queries + most - 1) / most;
}

inline QueryBlock query_block(QueryBlock all, int64_t index, int64_t count) {
  int64_t queries = all.last - all.first;
  QueryBlock block = all;
  block.first = all.first + queries * index / count;
  block.last = all.first + queries * (index + 1) / count;
  return block;
}

template <class T>
struct AttentionForward {
  AttentionShape shape;
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse;  // (T, H)
};

template <class T>
struct AttentionBackward {
  AttentionShape shape;
  Heads<const T> q, k, v, dout, out;
  const float* lse;
  Heads<T> dq, dk, dv;
};

// Where an item puts what others add to as well: fp32, to be summed up when all are done.
struct OwnParts {
  float* dq;      // (tokens, H, E) of a chunk's queries, or null: the queries are this item's alone
  float* shared;  // dk, then dv: twice (shared keys, K, E), of a document
};

}  // namespace minift
