// Causal attention over packed documents on the CPU: q (T, H, E), k and v (T', K, E), tokens and heads may be strided.
//
// Keys before the first document's are shared: every document has them before its own. They are read where they lie, as
// if each document had a copy; in backward each document makes its part of their gradient, and the parts are added
// afterwards, in order. Queries before the first document's are those of a document of shared keys alone.
//
// Forward is cut by document, key head and block of queries; each item walks over the keys its queries see. Backward is
// cut by document, key head and chunk of keys; each item walks over the queries that see them, and alone adds to these
// keys' gradients. A document of one chunk is the rule, and its item writes dq as well. A longer document has up to
// MAX_CHUNKS, whose parts of dq are added afterwards, in order. The cuts depend on sizes alone, and threads take the
// next item when they are done with one: results have the same bits with any number of threads.
//
// Memory beside the results is linear in the number of tokens: for each thread a block of queries against 64 keys and,
// in backward, fp32 dk and dv of a chunk; for long documents fp32 dq, once for each chunk that a token sees; and for
// each document fp32 dk and dv of the shared keys.

#include "attention.h"

#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#define MINIFT_KERNELS "attention_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

constexpr int64_t MAX_CHUNKS = 4, MIN_CHUNK_KEYS = 512;
constexpr int64_t NO_WINDOW = int64_t(1) << 40;
constexpr int64_t MOST_KEYS = int64_t(1) << 24;  // of a document: kernels count them in fp32

struct Item {
  QueryBlock block;
  int64_t kv_head;
  int64_t own_dq;      // where its part of dq begins among all parts, or -1
  int64_t own_shared;  // likewise of dk and dv of the shared keys
  int64_t work() const { return (block.last - block.first) * (block.last_key - block.first_key); }
};

// The part of dq that a chunk makes: of tokens [first, last), from element `begin` of all parts on.
struct PartOfDq { int64_t first, last, begin; };

const int32_t* check_bounds(const Tensor& bounds, int64_t tokens, const char* message) {
  STD_TORCH_CHECK(bounds.scalar_type() == ScalarType::Int && bounds.dim() == 1 && bounds.is_contiguous() &&
                      bounds.numel() >= 1, "attention: bounds must be contiguous int32 of one dimension");
  const int32_t* at = static_cast<const int32_t*>(bounds.data_ptr());
  bool valid = at[0] >= 0 && at[bounds.numel() - 1] == tokens;
  for (int64_t i = 1; i < bounds.numel(); ++i) valid = valid && at[i - 1] <= at[i];
  STD_TORCH_CHECK(valid, message);
  return at;
}

// One QueryBlock with all queries and keys for each document, and one for the queries of the shared keys, if there are
// any. A document without queries needs no shared keys.
std::vector<QueryBlock> documents(const Tensor& q, const Tensor& k, const Tensor& q_bounds, const Tensor& kv_bounds) {
  const int32_t* queries = check_bounds(q_bounds, q.size(0), "attention: q_bounds must rise to q's tokens");
  const int32_t* keys = check_bounds(kv_bounds, k.size(0), "attention: kv_bounds must rise to k's tokens");
  STD_TORCH_CHECK(q_bounds.numel() == kv_bounds.numel(), "attention: q_bounds and kv_bounds must be equally long");
  STD_TORCH_CHECK(queries[0] <= keys[0], "attention: more queries than keys before the first document");
  int64_t shared = keys[0];
  std::vector<QueryBlock> all;
  if (queries[0] > 0) all.push_back({0, queries[0], shared - queries[0], 0, shared, shared});
  for (int64_t i = 0; i + 1 < q_bounds.numel(); ++i) {
    int64_t num_queries = queries[i + 1] - queries[i];
    QueryBlock document{queries[i], queries[i + 1], keys[i + 1] - queries[i + 1], keys[i], keys[i + 1], keys[i]};
    STD_TORCH_CHECK(num_queries <= keys[i + 1] - keys[i], "attention: a document has more queries than keys");
    if (num_queries > 0) document.first_key -= shared;
    STD_TORCH_CHECK(document.last_key - document.first_key <= MOST_KEYS,
                    "attention: a document has more than 2^24 keys");
    all.push_back(document);
  }
  return all;
}

AttentionShape check_shape(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_bounds,
                           std::optional<int64_t> window) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && q.size(2) == k.size(2) && q.size(2) > 0,
                  "attention: q and k must be (tokens, heads, head dimension) with one head dimension");
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "attention: k's heads must divide q's");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type(), "attention: q and k must have one dtype");
  check_same(k, v, "attention: k and v must have one shape and dtype");
  STD_TORCH_CHECK(!window || *window >= 1, "attention: window must be at least 1");
  int64_t shared = *check_bounds(kv_bounds, k.size(0), "attention: kv_bounds must rise to k's tokens");
  return {q.size(2), q.size(1), q.size(1) / k.size(1), std::min(window.value_or(NO_WINDOW), NO_WINDOW), shared, 0};
}

Tensor with_heads(const Tensor& tensor) {
  return tensor.size(2) == 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

template <class T>
Heads<T> heads(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1)};
}

// function(item, memory) for every item, the largest first, by whichever thread is free.
template <class Function>
void for_each_item(std::vector<Item>& items, int64_t scratch_floats, const Tensor& like, const Function& function) {
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.work() > b.work(); });
  int64_t count = static_cast<int64_t>(items.size());
  int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  if (count == 0) return;
  Tensor scratch = torch::stable::new_empty(like, {threads, scratch_floats}, ScalarType::Float);
  float* memory = static_cast<float*>(scratch.data_ptr());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    for (int64_t i = next++; i < count; i = next++) function(items[i], memory + begin * scratch_floats);
  });
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_bounds,
                                     const Tensor& kv_bounds, std::optional<int64_t> window) {
  AttentionShape shape = check_shape(q, k, v, kv_bounds, window);
  int64_t kv_heads = k.size(1);
  std::vector<Item> items;
  for (const QueryBlock& document : documents(q, k, q_bounds, kv_bounds)) {
    int64_t count = num_query_blocks(document.last - document.first, shape.group);
    for (int64_t head = 0; head < kv_heads; ++head) {
      for (int64_t i = 0; i < count; ++i) {
        QueryBlock block = query_block(document, i, count);
        block.last_key = block.last + block.shift;
        items.push_back({block, head, -1, -1});
      }
    }
  }
  Tensor out = new_like(q), lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  Tensor q_heads = with_heads(q), k_heads = with_heads(k), v_heads = with_heads(v);
  dispatch_dtype(q, "attention", [&](auto element) {
    using T = decltype(element);
    AttentionForward<T> tensors{shape, heads<const T>(q_heads), heads<const T>(k_heads), heads<const T>(v_heads),
                                heads<T>(out), static_cast<float*>(lse.data_ptr())};
    auto* kernel = MINIFT_KERNEL(attention<T>);
    for_each_item(items, MINIFT_KERNEL(forward_scratch<T>)(shape), q, [&](const Item& item, float* memory) {
      kernel(tensors, item.block, item.kv_head, memory);
    });
  });
  return {out, lse};
}

// The document's keys in chunks of about equal work: chunk c of C begins where (1 - begin / keys)^2 = 1 - c / C, as the
// later keys are seen by fewer queries.
std::vector<QueryBlock> chunks(const QueryBlock& document, int64_t window) {
  int64_t keys = document.last_key - document.first_key;
  int64_t count = std::clamp<int64_t>(keys / MIN_CHUNK_KEYS, 1, MAX_CHUNKS);
  std::vector<QueryBlock> cut;
  for (int64_t c = 0, begin = 0, end; c < count; ++c, begin = end) {
    double share = 1 - std::sqrt(1 - double(c + 1) / count);
    end = c + 1 == count ? keys : int64_t(share * keys / ATTENTION_KEYS) * ATTENTION_KEYS;
    QueryBlock chunk = document;
    chunk.first_key = document.first_key + begin;
    chunk.last_key = document.first_key + end;
    chunk.first = std::clamp(chunk.first_key - chunk.shift, document.first, document.last);
    chunk.last = std::clamp(chunk.last_key - 1 + window - chunk.shift, chunk.first, document.last);
    cut.push_back(chunk);
  }
  return cut;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      const Tensor& q_bounds, const Tensor& kv_bounds,
                                                      std::optional<int64_t> window) {
  AttentionShape shape = check_shape(q, k, v, kv_bounds, window);
  check_same(dout, q, "attention_backward: dout must have the shape and dtype of q");
  check_same(out, q, "attention_backward: out must have the shape and dtype of q");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.numel() == q.size(0) * q.size(1),
                  "attention_backward: lse must be contiguous float32 (tokens, heads), as attention returns it");
  int64_t kv_heads = k.size(1), width = shape.heads * shape.dim, kv_width = kv_heads * shape.dim;
  int64_t elements_in_parts = 0, shared_numel = shape.shared * kv_width, num_sharing = 0;
  std::vector<Item> items;
  std::vector<std::vector<PartOfDq>> in_parts;  // of each document with several chunks
  for (const QueryBlock& document : documents(q, k, q_bounds, kv_bounds)) {
    std::vector<QueryBlock> cut = chunks(document, shape.window);
    if (cut.size() > 1) in_parts.emplace_back();
    int64_t own_shared = document.first_key < document.own_key ? num_sharing++ * 2 * shared_numel : -1;
    for (const QueryBlock& chunk : cut) {
      shape.most_keys = std::max(shape.most_keys, chunk.last_key - chunk.first_key);
      int64_t own_dq = -1;
      if (cut.size() > 1) {
        own_dq = elements_in_parts;
        in_parts.back().push_back({chunk.first, chunk.last, own_dq});
        elements_in_parts += (chunk.last - chunk.first) * width;
      }
      for (int64_t head = 0; head < kv_heads; ++head) items.push_back({chunk, head, own_dq, own_shared});
    }
  }
  Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  Tensor parts = torch::stable::new_empty(q, {elements_in_parts}, ScalarType::Float);
  Tensor shared_parts = torch::stable::new_empty(q, {num_sharing * 2 * shared_numel}, ScalarType::Float);
  float *part = static_cast<float*>(parts.data_ptr()), *shared_part = static_cast<float*>(shared_parts.data_ptr());
  Tensor q_heads = with_heads(q), k_heads = with_heads(k), v_heads = with_heads(v);
  Tensor dout_heads = with_heads(dout), out_heads = with_heads(out);
  dispatch_dtype(q, "attention_backward", [&](auto element) {
    using T = decltype(element);
    AttentionBackward<T> tensors{shape,
                                 heads<const T>(q_heads), heads<const T>(k_heads), heads<const T>(v_heads),
                                 heads<const T>(dout_heads), heads<const T>(out_heads),
                                 static_cast<const float*>(lse.data_ptr()),
                                 heads<T>(dq), heads<T>(dk), heads<T>(dv)};
    auto* kernel = MINIFT_KERNEL(attention_backward<T>);
    for_each_item(items, MINIFT_KERNEL(backward_scratch<T>)(shape), q, [&](const Item& item, float* memory) {
      OwnParts own{item.own_dq < 0 ? nullptr : part + item.own_dq,
                   item.own_shared < 0 ? nullptr : shared_part + item.own_shared};
      kernel(tensors, item.block, item.kv_head, own, memory);
    });
    auto* sum = MINIFT_KERNEL(sum_rows<T>);
    for (const std::vector<PartOfDq>& of_document : in_parts) {
      int64_t first = of_document.front().first, last = of_document.back().last;
      parallel_rows(last - first, width * MAX_CHUNKS, [&](int64_t begin, int64_t end) {
        for (int64_t token = first + begin; token < first + end; ++token) {
          const float* rows[MAX_CHUNKS];
          int64_t count = 0;
          for (const PartOfDq& of : of_document) {
            if (of.first <= token && token < of.last) rows[count++] = part + of.begin + (token - of.first) * width;
          }
          sum(rows, count, width, tensors.dq.at(token, 0));
        }
      });
    }
    parallel_rows(shape.shared, 2 * kv_width * (num_sharing + 1), [&](int64_t begin, int64_t end) {
      std::vector<const float*> rows(num_sharing);
      for (int64_t key = begin; key < end; ++key) {
        for (int64_t i = 0; i < num_sharing; ++i) rows[i] = shared_part + 2 * i * shared_numel + key * kv_width;
        sum(rows.data(), num_sharing, kv_width, tensors.dk.at(key, 0));
        for (const float*& row : rows) row += shared_numel;
        sum(rows.data(), num_sharing, kv_width, tensors.dv.at(key, 0));
      }
    });
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace minift
