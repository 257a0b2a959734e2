// The environment table (base/env.h).
#include "base/env.h"

#include <cstdlib>
#include <cstring>

#include "base/error.h"
#include "check.h"

namespace dpcomm {
namespace {

TEST(the_table_names_each_variable_once) {
  const auto& table = environment_table();
  CHECK(!table.empty());
  for (std::size_t i = 0; i < table.size(); ++i) {
    CHECK(std::strncmp(table[i].name, "DPCOMM_", 7) == 0);
    CHECK(std::strlen(table[i].help) > 0);
    for (std::size_t j = i + 1; j < table.size(); ++j) {
      CHECK(std::strcmp(table[i].name, table[j].name) != 0);
    }
  }
}

TEST(an_empty_value_counts_as_not_set) {
  setenv("DPCOMM_WIRE", "", 1);
  CHECK_EQ(environment(Variable::WIRE), std::string("native"));
  setenv("DPCOMM_WIRE", "fp16", 1);
  CHECK_EQ(environment(Variable::WIRE), std::string("fp16"));
  unsetenv("DPCOMM_WIRE");
  CHECK_EQ(environment(Variable::WIRE), std::string("native"));
}

TEST(numbers_are_numbers) {
  setenv("DPCOMM_TIMEOUT", "2.5", 1);
  CHECK_EQ(environment_number(Variable::TIMEOUT, 1.0), 2.5);
  for (const char* wrong : {"2.5s", "-1", "soon", "nan", " "}) {
    setenv("DPCOMM_TIMEOUT", wrong, 1);
    CHECK_THROWS(Error, environment_number(Variable::TIMEOUT, 1.0));
  }
  unsetenv("DPCOMM_TIMEOUT");
  CHECK_EQ(environment_number(Variable::TIMEOUT, 1.0), 1.0);
}

}  // namespace
}  // namespace dpcomm
