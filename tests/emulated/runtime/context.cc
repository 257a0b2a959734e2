#include "context.h"

#if defined(__x86_64__) && !defined(DPCOMM_EMULATED_UCONTEXT)
asm(R"(
.text
.globl dpcomm_emulated_switch
.type dpcomm_emulated_switch, @function
dpcomm_emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dpcomm_emulated_switch, . - dpcomm_emulated_switch
)");
#endif
