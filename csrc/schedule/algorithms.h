// Every schedule, included once for the readers that enumerate schedule/algorithms.def.
#pragma once

#include "schedule/chain.h"
#include "schedule/collective.h"
#include "schedule/direct.h"
#include "schedule/direct_blocks.h"
#include "schedule/double_tree.h"
#include "schedule/one_shot.h"
#include "schedule/ring.h"
#include "schedule/rooted_tree.h"
#include "schedule/rotated_trees.h"
#include "schedule/two_shot.h"
