// DLPack's C structures (dlpack.h, versions 0.x and 1.x), as far as a consumer needs them.
#pragma once

#include <cstdint>

namespace dpcomm {

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  ///< in elements; null: C-contiguous
  uint64_t byte_offset;
};
/// In a capsule named "dltensor".
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};
/// In a capsule named "dltensor_versioned". What comes before dl_tensor is the same in all
/// versions.
struct DLManagedTensorVersioned {
  uint32_t major, minor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor dl_tensor;
};
/// What an array's type has as the capsule "dlpack_exchange_api" in __dlpack_c_exchange_api__ (from
/// DLPack 1.3): functions that need no Python call.
struct DLPackExchangeAPI {
  struct Header {
    struct {
      uint32_t major, minor;
    } version;
    Header* previous;
  } header;
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object_no_sync)();
  void (*managed_tensor_to_py_object_no_sync)();
  /// A view that is good as long as the object is neither changed nor released. 0, or -1 with a
  /// Python error.
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
  void (*current_work_stream)();
};
inline constexpr uint32_t kDLMajor = 1;
inline constexpr uint64_t kDLReadOnly = 1, kDLCopied = 2;

enum DLDeviceType : int32_t {
  kDLCPU = 1,
  kDLCUDA = 2,
  kDLCUDAHost = 3,
  kDLROCM = 10,
  kDLROCMHost = 11,
  kDLCUDAManaged = 13,
};
enum DLCode : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

/// True if elements lie in memory in C order, without gaps. Both arrays have `ndim` entries;
/// strides are in units of `unit`, and null for C order.
bool is_contiguous(int ndim, const int64_t* shape, const int64_t* strides, int64_t unit);

}  // namespace dpcomm
