// The benchmark's calls of oneCCL, as a C interface for ctypes. Built by tools/install_peers.sh.
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <oneapi/ccl.hpp>

#define PEER_TEXT_(x) #x
#define PEER_TEXT(x) PEER_TEXT_(x)

namespace {

std::shared_ptr<ccl::kvs> kvs;
std::unique_ptr<ccl::communicator> communicator;

// Runs `action`; 0, or 1 with the text on stderr.
template <typename Action>
int guarded(Action action) {
  try {
    action();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "oneCCL: %s\n", error.what());
    return 1;
  }
}

}  // namespace

extern "C" {

extern const char* const peer_version;
const char* const peer_version =
    PEER_TEXT(CCL_MAJOR_VERSION) "." PEER_TEXT(CCL_MINOR_VERSION) "." PEER_TEXT(CCL_UPDATE_VERSION);

// On rank 0 only: makes the meeting point and writes its address (256 bytes).
int peer_address(char* address) {
  return guarded([&] {
    ccl::init();
    kvs = ccl::create_main_kvs();
    const auto made = kvs->get_address();
    std::memcpy(address, made.data(), made.size());
  });
}

int peer_start(const char* address, int rank, int size) {
  return guarded([&] {
    ccl::init();
    if (!kvs) {
      ccl::kvs::address_type given;
      std::memcpy(given.data(), address, given.size());
      kvs = ccl::create_kvs(given);
    }
    communicator = std::make_unique<ccl::communicator>(ccl::create_communicator(size, rank, kvs));
  });
}

// `calls` all-reduces of float32 in place: the i-th of counts[i] elements at buffers[i].
int peer_all_reduce(float* const* buffers, const std::size_t* counts, std::size_t calls) {
  return guarded([&] {
    for (std::size_t i = 0; i < calls; ++i) {
      ccl::allreduce(buffers[i], buffers[i], counts[i], ccl::reduction::sum, *communicator).wait();
    }
  });
}

void peer_finish() {
  communicator.reset();
  kvs.reset();
}

}  // extern "C"
