// Names and texts of errors. The names are those of the headers; the texts are our own.
#include "runtime.h"

#define FAKE_CUDA_ERRORS(X)                                                                      \
  X(Success, "no error")                                                                         \
  X(ErrorInvalidValue, "a parameter is not what the call accepts")                               \
  X(ErrorMemoryAllocation, "the virtual device has no memory left")                              \
  X(ErrorInitializationError, "the runtime cannot be used here (a child after fork?)")           \
  X(ErrorInvalidConfiguration, "the grid or block is empty or too large")                        \
  X(ErrorInvalidPitchValue, "the pitch is invalid")                                              \
  X(ErrorInvalidMemcpyDirection, "the direction does not match the memory")                      \
  X(ErrorInsufficientDriver, "the CUDA driver is older than this runtime needs")                 \
  X(ErrorInvalidDeviceFunction, "no such kernel for this device")                                \
  X(ErrorNoDevice, "there is no CUDA device")                                                    \
  X(ErrorInvalidDevice, "no such device")                                                        \
  X(ErrorDeviceUninitialized, "the context is invalid (a handle of the own process?)")           \
  X(ErrorPeerAccessUnsupported, "the devices cannot reach each other")                           \
  X(ErrorInvalidResourceHandle, "the stream, event or other handle is invalid")                  \
  X(ErrorIllegalState, "the operation is illegal in this state")                                 \
  X(ErrorNotReady, "not finished yet")                                                           \
  X(ErrorIllegalAddress, "a kernel went to memory that is not its own")                          \
  X(ErrorLaunchOutOfResources, "the block asks for more than a multiprocessor has")              \
  X(ErrorLaunchTimeout, "a kernel did not end within the deadline")                              \
  X(ErrorPeerAccessAlreadyEnabled, "peer access is enabled already")                             \
  X(ErrorPeerAccessNotEnabled, "peer access is not enabled")                                     \
  X(ErrorHostMemoryAlreadyRegistered, "the memory is registered already")                        \
  X(ErrorHostMemoryNotRegistered, "the memory is not registered")                                \
  X(ErrorLaunchFailure, "a kernel failed")                                                       \
  X(ErrorCooperativeLaunchTooLarge, "the blocks of a cooperative launch cannot all be resident") \
  X(ErrorNotPermitted, "not permitted here")                                                     \
  X(ErrorNotSupported, "the fake runtime does not have this")                                    \
  X(ErrorMapBufferObjectFailed, "the handle cannot be mapped")                                   \
  X(ErrorStreamCaptureUnsupported, "not permitted while a stream is capturing")                  \
  X(ErrorStreamCaptureInvalidated, "the capture has failed before")                              \
  X(ErrorStreamCaptureMerge, "this would join two captures")                                     \
  X(ErrorStreamCaptureUnmatched, "this stream did not begin the capture")                        \
  X(ErrorStreamCaptureUnjoined, "the capture ends with work that was not joined")                \
  X(ErrorStreamCaptureIsolation, "a dependency would cross the border of the capture")           \
  X(ErrorStreamCaptureImplicit, "the default stream would wait for a capturing stream")          \
  X(ErrorCapturedEvent, "the event was last recorded in a capture")                              \
  X(ErrorStreamCaptureWrongThread, "another thread began the capture")                           \
  X(ErrorUnknown, "unknown error")

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define FAKE_CUDA_NAME(name, text) \
  case cuda##name:                 \
    return "cuda" #name;
    FAKE_CUDA_ERRORS(FAKE_CUDA_NAME)
    default:
      return "unrecognized error code";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
#define FAKE_CUDA_TEXT(name, text) \
  case cuda##name:                 \
    return text;
    FAKE_CUDA_ERRORS(FAKE_CUDA_TEXT)
    default:
      return "unrecognized error code";
  }
}
