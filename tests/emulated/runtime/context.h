// Switching between stacks. On x86-64 a few instructions (swapcontext calls the kernel each time to
// save signal masks), elsewhere ucontext.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(DPCOMM_EMULATED_UCONTEXT)
#include <ucontext.h>
#endif

namespace dpcomm::emulated {

#if defined(__x86_64__) && !defined(DPCOMM_EMULATED_UCONTEXT)

/// A stack pointer; the registers that a function has to keep lie on the stack.
struct Context {
  void* stack_pointer = nullptr;
};

/// In context.cc.
extern "C" void dpcomm_emulated_switch(void** save, void* to);

inline void switch_context(Context& from, Context& to) {
  dpcomm_emulated_switch(&from.stack_pointer, to.stack_pointer);
}

/// A context that calls `entry`, which never returns, on a stack of `bytes` at `stack`.
inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // where entry would return to; entry is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

#else

struct Context {
  ucontext_t state;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

#endif

}  // namespace dpcomm::emulated
