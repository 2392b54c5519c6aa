// Attention of one block of queries to the keys it sees, and its gradients.
//
// Vectors run along *queries*: lane (t - first) * group + g is query token t of the g-th head that shares the key head.
// So scores stand as S^T[key][lane] = K Q^T: the maximum, the sum and everything else that softmax does per query is
// element-wise, and keys and values are read as they lie in memory, one element broadcast to a vector of queries:
//
//     S^T = K Q^T    dP^T = V dO^T    O^T += V^T P^T    dQ^T += K^T dS^T      (keys or E) x lanes
//     dV += P^T dO   dK += dS^T Q                                             keys x E
//
// Sums, softmax and its gradient are fp32. Products are of fp32, or, of bf16 tensors where the processor has an
// instruction for it (TERMS), of pairs of bf16, twice as many in the same time: P and dS are then rounded to bf16, as
// in every flash attention. The two elements of a pair are neighbours along the dimension that is summed over, so a
// matrix lies in memory as often as there are sums that it takes part in: `keys` as loaded are for sums over E,
// keys_over_keys for the sum over keys. With fp32 the two are the same memory.
//
// What is (E, lanes) is stored in panels: up to TILE_VECTORS vectors of lanes with all their E, one after the other. E
// is padded to whole vectors with zeros.

#include "attention_tiles.h"
#include "attention_layouts.h"

#include "attention_forward_kernels.h"
#include "attention_backward_kernels.h"

#undef INLINE
#undef INLINE_MEMBER
