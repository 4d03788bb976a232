# The CUDA language, only with ISOBATH_WITH_CUDA. A module names its *.cu files behind CUDA; they include neither ATen
# nor the module's other dependencies (seconds a file instead of minutes) and are compiled on their own.
if(ISOBATH_WITH_CUDA)
  find_package(CUDAToolkit REQUIRED)
  if(NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER ${CUDAToolkit_NVCC_EXECUTABLE})
  endif()
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90)  # and PTX of the last, for later ones
  endif()
  set(CMAKE_CUDA_STANDARD 17)  # CMake 3.25 knows no more
  enable_language(CUDA)
endif()

# isobath_add_cuda(<module> <file.cu>…): adds device code to the library of a module. Multiply-adds are fused where the
# source says fmaf and nowhere else: the tests run the same arithmetic on the host.
function(isobath_add_cuda name)
  if(NOT TARGET isobath_${name})
    return()
  endif()
  list(TRANSFORM ARGN PREPEND ${PROJECT_SOURCE_DIR}/src/${name}/ OUTPUT_VARIABLE sources)
  add_library(isobath_${name}_cuda OBJECT ${sources})
  target_include_directories(isobath_${name}_cuda PRIVATE ${PROJECT_SOURCE_DIR}/include)
  target_compile_options(isobath_${name}_cuda PRIVATE --fmad=false -Xcompiler=-Wall,-Wextra)
  target_sources(isobath_${name} PRIVATE $<TARGET_OBJECTS:isobath_${name}_cuda>)
endfunction()
