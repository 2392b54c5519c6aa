// Attention of one block of queries to the keys it sees, and its gradients, in fp32.
//
// Vectors run along *queries*: lane (t - first) * group + g is query token t of the g-th head that shares the key head.
// So scores stand as S^T[key][lane] = K Q^T: the maximum, the sum and everything else that softmax does per query is
// element-wise, and keys and values are read as they lie in memory, one element broadcast to a vector of queries:
//
//     S^T = K Q^T    dP^T = V dO^T    O^T += V^T P^T    dQ^T += K^T dS^T      (keys or E) x lanes
//     dV += P^T dO   dK += dS^T Q                                             keys x E
//
// Only Q, dO and their results change layout, once per block. What is (E, lanes) is stored in panels: up to
// TILE_VECTORS vectors of lanes with all their E, one after the other. E is padded to whole vectors with zeros.

#include "attention_tiles.h"

#include "attention_forward_kernels.h"
#include "attention_backward_kernels.h"

#undef INLINE
