#include "base/env.h"

#include <cstdlib>

#include "base/error.h"

namespace dpcomm {

const std::vector<VariableInfo>& environment_table() {
  static const std::vector<VariableInfo> table = {
#define DPCOMM_VARIABLE(name, fallback, help) {"DPCOMM_" #name, fallback, help},
#include "base/env.def"
#undef DPCOMM_VARIABLE
  };
  return table;
}

std::string environment(Variable variable) {
  const VariableInfo& info = environment_table()[static_cast<size_t>(variable)];
  const char* value = std::getenv(info.name);
  return value != nullptr && *value != '\0' ? value : info.fallback;
}

double environment_number(Variable variable, double fallback) {
  const std::string value = environment(variable);
  if (value.empty()) return fallback;
  char* end = nullptr;
  const double number = std::strtod(value.c_str(), &end);
  if (*end != '\0' || !(number >= 0)) {
    throw usage_error(environment_table()[static_cast<size_t>(variable)].name, "=", value,
                      " is not a non-negative number");
  }
  return number;
}

}  // namespace dpcomm
