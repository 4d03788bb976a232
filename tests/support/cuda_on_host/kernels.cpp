// All device code of the project, with this folder's headers in place of CUDA's.
#include "src/kernels/cuda/gram.cu"
#include "src/quant/cuda/column_block.cu"
#include "src/quant/cuda/group_fit.cu"
#include "src/quant/cuda/refine.cu"
