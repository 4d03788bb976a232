# LibTorch from the `torch` wheel, as the imported target isobath_torch. `find_package(Torch)` of that wheel demands a
# CUDA toolkit even for CPU use, so the libraries are named directly. Installed beside isobathConfig.cmake too.
if(NOT ISOBATH_TORCH_ROOT)
  file(GLOB candidates ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch)
  list(LENGTH candidates n_candidates)
  if(n_candidates EQUAL 0)
    message(FATAL_ERROR "LibTorch not found: expected a `torch` wheel in ${PROJECT_SOURCE_DIR}/.venv "
                        "(run launch/setup.sh) or -DISOBATH_TORCH_ROOT=<site-packages>/torch")
  endif()
  list(GET candidates 0 ISOBATH_TORCH_ROOT)
endif()
set(ISOBATH_TORCH_ROOT ${ISOBATH_TORCH_ROOT} CACHE PATH "The torch folder of the Python wheel")
if(NOT EXISTS ${ISOBATH_TORCH_ROOT}/lib/libtorch_cpu.so)
  message(FATAL_ERROR "ISOBATH_TORCH_ROOT=${ISOBATH_TORCH_ROOT} has no lib/libtorch_cpu.so; "
                      "it must be the torch folder of a wheel, <site-packages>/torch")
endif()
get_filename_component(site_packages ${ISOBATH_TORCH_ROOT} DIRECTORY)
file(GLOB nvidia_library_dirs ${site_packages}/nvidia/*/lib)

if(NOT TARGET isobath_torch)
  add_library(isobath_torch INTERFACE IMPORTED GLOBAL)
  # Searched last: the wheel also carries its own copy of fmt, which must not shadow the one that spdlog was built with.
  target_compile_options(isobath_torch INTERFACE "SHELL:-idirafter ${ISOBATH_TORCH_ROOT}/include"
    "SHELL:-idirafter ${ISOBATH_TORCH_ROOT}/include/torch/csrc/api/include")
  # at::parallel_for is a header: without OpenMP it is compiled as a plain loop. The runtime must be the wheel's, whose
  # number of threads at::set_num_threads sets.
  target_compile_options(isobath_torch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
  file(GLOB openmp_runtime ${ISOBATH_TORCH_ROOT}/lib/libgomp*.so* ${site_packages}/torch.libs/libgomp*.so*)
  if(openmp_runtime)
    list(GET openmp_runtime 0 openmp_runtime)
    target_link_libraries(isobath_torch INTERFACE ${openmp_runtime})
  else()
    target_link_options(isobath_torch INTERFACE -fopenmp)
  endif()
  target_link_directories(isobath_torch INTERFACE ${ISOBATH_TORCH_ROOT}/lib)
  target_link_libraries(isobath_torch INTERFACE torch_cpu c10)
  target_link_options(isobath_torch INTERFACE -Wl,--allow-shlib-undefined -Wl,-rpath,${ISOBATH_TORCH_ROOT}/lib)
  foreach(directory IN LISTS nvidia_library_dirs)
    # libtorch_cpu.so of a CUDA wheel needs libcudart and libcupti at load time, by DT_NEEDED without a path.
    target_link_options(isobath_torch INTERFACE -Wl,-rpath,${directory} -Wl,-rpath-link,${directory})
  endforeach()
  if(ISOBATH_WITH_CUDA)
    find_package(CUDAToolkit REQUIRED)
    find_path(NCCL_INCLUDE_DIR nccl.h REQUIRED HINTS ${CUDAToolkit_INCLUDE_DIRS})
    find_library(NCCL_LIBRARY nccl REQUIRED HINTS ${CUDAToolkit_LIBRARY_DIR})
    # No symbol of torch_cuda is named anywhere: it registers ATen's operations for CUDA tensors when it is loaded, and
    # linkers that drop unused libraries would drop it.
    target_link_libraries(isobath_torch INTERFACE "-Wl,--push-state,--no-as-needed,-ltorch_cuda,--pop-state" c10_cuda
      CUDA::cudart)
  endif()
endif()
