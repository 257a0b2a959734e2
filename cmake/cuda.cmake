# libdpcomm_cuda.so: kernels, their host's side and CUDA's runtime, which is linked in. It is loaded
# when somebody first asks for a device (csrc/cuda/loader.cc). nvcc is called as it is, without
# CMake's language CUDA, whose checks want a toolkit in which programs link and run.
#
# In: DPCOMM_NVCC, DPCOMM_CUDA_ARCHITECTURES. Out: record_cuda and record_architectures. Threads of
# nvcc, one for each architecture, are given through NVCC_APPEND_FLAGS=--threads=2 (setup.py does),
# since in the command line they would make a new build of everything.
execute_process(COMMAND ${DPCOMM_NVCC} --version OUTPUT_VARIABLE version_text
                ERROR_VARIABLE version_text RESULT_VARIABLE failed)
if(failed OR NOT version_text MATCHES "release ([0-9]+\\.[0-9]+)")
  message(FATAL_ERROR "DPCOMM_NVCC=${DPCOMM_NVCC} is no nvcc: ${version_text}")
endif()
set(cuda_version ${CMAKE_MATCH_1})
if(cuda_version VERSION_LESS 12.8)
  message(FATAL_ERROR "${DPCOMM_NVCC} is of CUDA ${cuda_version}; dpcomm needs 12.8 or newer")
endif()
# nvcc may be a script that calls another one, so it is asked where its files are.
execute_process(COMMAND ${DPCOMM_NVCC} --dryrun -c none.cu OUTPUT_VARIABLE dry_run
                ERROR_VARIABLE dry_run)
if(NOT dry_run MATCHES "TOP=([^\n]+)")
  message(FATAL_ERROR "${DPCOMM_NVCC} --dryrun does not tell where CUDA is: ${dry_run}")
endif()
get_filename_component(cuda_top ${CMAKE_MATCH_1} ABSOLUTE)
file(GLOB cuda_targets ${cuda_top}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux ${cuda_top}/targets/sbsa-linux)
unset(DPCOMM_CUDA_INCLUDE CACHE)
unset(DPCOMM_CUDART_STATIC CACHE)
find_path(DPCOMM_CUDA_INCLUDE cuda_runtime_api.h HINTS ${cuda_top} ${cuda_targets}
          PATH_SUFFIXES include REQUIRED)
find_library(DPCOMM_CUDART_STATIC libcudart_static.a HINTS ${cuda_top} ${cuda_targets}
             PATH_SUFFIXES lib64 lib REQUIRED)
message(STATUS "CUDA ${cuda_version} at ${cuda_top} for ${DPCOMM_CUDA_ARCHITECTURES}")

# "75;120+PTX" -> what nvcc wants
set(gencode "")
set(record_architectures "")
foreach(architecture ${DPCOMM_CUDA_ARCHITECTURES})
  string(REPLACE "+PTX" "" number ${architecture})
  list(APPEND gencode -gencode=arch=compute_${number},code=sm_${number})
  if(architecture MATCHES "\\+PTX$")
    list(APPEND gencode -gencode=arch=compute_${number},code=compute_${number})
  endif()
  string(APPEND record_architectures "\"${architecture}\", ")
endforeach()
string(STRIP "(${record_architectures})" record_architectures)
string(REPLACE ", )" ",)" record_architectures "${record_architectures}")
set(record_cuda "'${cuda_version}'")

set(host_compiler ${CMAKE_CXX_COMPILER})
if(DEFINED ENV{CUDAHOSTCXX})
  set(host_compiler $ENV{CUDAHOSTCXX})
endif()
set(nvcc_flags -std=c++20 -O3 --fmad=false -ccbin ${host_compiler} -I${CMAKE_CURRENT_SOURCE_DIR}/csrc
               -Xcompiler=-fPIC,-ffp-contract=off,-fvisibility=hidden -compress-mode=size ${gencode})

set(cuda_objects "")
file(GLOB cuda_kernels CONFIGURE_DEPENDS csrc/cuda/*.cu)
foreach(source ${cuda_kernels})
  get_filename_component(name ${source} NAME)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.o)
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_CURRENT_BINARY_DIR}/cuda
    COMMAND ${DPCOMM_NVCC} ${nvcc_flags} -MD -MT ${object} -MF ${object}.d -c
            ${source} -o ${object}
    DEPENDS ${source} DEPFILE ${object}.d COMMENT "Compiling ${name}: ${DPCOMM_CUDA_ARCHITECTURES}"
    VERBATIM)
  list(APPEND cuda_objects ${object})
endforeach()

add_library(dpcomm_cuda MODULE ${cuda_plugin_sources} ${cuda_objects})
target_include_directories(dpcomm_cuda SYSTEM PRIVATE ${DPCOMM_CUDA_INCLUDE})
target_link_libraries(dpcomm_cuda PRIVATE dpcomm_core ${DPCOMM_CUDART_STATIC} ${CMAKE_DL_LIBS} rt)
dpcomm_finish_module(dpcomm_cuda exports_cuda.map)
