// Shapes of trees: who is whose parent. Arithmetic on ranks, no memory.
//
// In-order tree: nodes 1..M numbered from left to right; the height of node i is the number of its
// trailing zero bits, as in an infinite perfect tree of which the nodes beyond M are left out.
//
//   M = 6          4                      odd nodes are leaves, even ones are not;
//             2         6                 the root is the largest power of two <= M;
//          1     3   5                    the depth is floor(log2 M) edges
//
// Double binary tree: two trees over the same ranks, so that a rank that is a leaf (and sends
// little) in one is inside the other. Mirroring i -> M + 1 - i turns leaves into inner nodes where
// M is even. For an odd number of ranks, rank 0 stands above both trees, with one child in each,
// and the others form trees of even size.
//
// Source: Sanders, Speck, Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and
// scan" (2009); the numbering by bits is our own.
#pragma once

#include <cstdint>

#include "base/macros.h"

namespace dpcomm {

/// A rank's place in a binary tree; -1 stands for nobody.
struct TreeNode {
  int32_t parent = -1;
  int32_t children[2] = {-1, -1};

  DPCOMM_HD constexpr bool is_root() const { return parent < 0; }
  DPCOMM_HD constexpr bool is_leaf() const { return children[0] < 0 && children[1] < 0; }
};

/// The largest power of two <= n, for n >= 1.
DPCOMM_HD constexpr int32_t floor_power(int32_t n) {
  int32_t power = 1;
  while (power <= n / 2) power *= 2;
  return power;
}

/// floor(log2 n), for n >= 1.
DPCOMM_HD constexpr int floor_log2(int32_t n) {
  int log = 0;
  while (n >>= 1) ++log;
  return log;
}

/// The lowest set bit of n > 0.
DPCOMM_HD constexpr int32_t lowest_bit(int32_t n) { return n & -n; }

/// Node `i` of the in-order tree of nodes 1..size. Parent and children are nodes, -1 for none.
DPCOMM_HD constexpr TreeNode in_order_node(int32_t i, int32_t size) {
  TreeNode node;
  if (i != floor_power(size)) {
    node.parent = i;
    do {  // the nearest ancestor that exists
      const int32_t bit = lowest_bit(node.parent);
      node.parent = (node.parent - bit) | (bit * 2);
    } while (node.parent > size);
  }
  const int32_t half = lowest_bit(i) / 2;
  if (half == 0) return node;
  node.children[0] = i - half;
  for (int32_t step = half; step > 0; step /= 2) {  // the nearest right descendant that exists
    if (i + step <= size) {
      node.children[1] = i + step;
      break;
    }
  }
  return node;
}

/// The place of `rank` in tree 0 or 1 of the double binary tree of `world` ranks.
DPCOMM_HD constexpr TreeNode double_tree_node(int32_t rank, int32_t world, int tree) {
  const int32_t odd = world % 2;     // 1: rank 0 stands above the tree of the others
  const int32_t size = world - odd;  // nodes 1..size are ranks odd..world-1, or mirrored
  TreeNode node;
  if (odd && rank == 0) {
    if (size == 0) return node;
    node.children[0] = tree == 0 ? floor_power(size) : size + 1 - floor_power(size);
    return node;
  }
  const int32_t own = rank + 1 - odd;
  node = in_order_node(tree == 0 ? own : size + 1 - own, size);
  int32_t* const places[] = {&node.parent, &node.children[0], &node.children[1]};
  for (int32_t* at : places) {
    if (*at < 0) continue;
    *at = (tree == 0 ? *at : size + 1 - *at) - 1 + odd;
  }
  if (odd && node.parent < 0) node.parent = 0;
  return node;
}

/// Edges from the root of the double binary tree to its deepest leaf (the same in both trees).
DPCOMM_HD constexpr int double_tree_depth(int32_t world) {
  if (world < 2) return 0;
  return floor_log2(world - world % 2) + world % 2;
}

/// The place of `rank` in the binary heap rotated so that `root` is at the top: with
/// v = (rank - root) mod world, the children of v are 2 v + 1 and 2 v + 2.
DPCOMM_HD constexpr TreeNode heap_node(int32_t rank, int32_t world, int32_t root) {
  const int32_t v = (rank - root + world) % world;
  TreeNode node;
  if (v > 0) node.parent = ((v - 1) / 2 + root) % world;
  for (int32_t i = 0; i < 2; ++i) {
    const int64_t child = int64_t{2} * v + 1 + i;
    if (child < world) node.children[i] = static_cast<int32_t>((child + root) % world);
  }
  return node;
}

/// Edges from the root of the heap to its deepest leaf.
DPCOMM_HD constexpr int heap_depth(int32_t world) { return floor_log2(world); }

}  // namespace dpcomm
