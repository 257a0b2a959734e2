// Every schedule, included once for the readers that enumerate schedule/algorithms.def.
#pragma once

#include "schedule/collective.h"
#include "schedule/two_shot.h"
