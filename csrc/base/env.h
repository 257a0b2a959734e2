// The environment table: every DPCOMM_* variable in one place (base/env.def).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dpcomm {

enum class Variable {
#define DPCOMM_VARIABLE(name, fallback, help) name,
#include "base/env.def"
#undef DPCOMM_VARIABLE
};

struct VariableInfo {
  const char* name;  ///< with the prefix DPCOMM_
  const char* fallback;
  const char* help;
};

/// The table, in the order of base/env.def.
const std::vector<VariableInfo>& environment_table();

/// The value of a variable now, or its default. An empty value counts as not set.
std::string environment(Variable variable);

/// The same as a non-negative number; `fallback` where the value is empty. Throws UsageError naming
/// the variable for anything else than a number.
double environment_number(Variable variable, double fallback);

}  // namespace dpcomm
