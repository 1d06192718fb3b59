// The product of two float32 matrices whose rows are contiguous, by the kernels that oneDNN has for blocks: a tenth of
// what calling its product takes, and the result goes where it is needed.
#include <algorithm>
#include <atomic>

#include <omp.h>

namespace at::native::cpublas {
void brgemm(
    int64_t rows, int64_t columns, int64_t inner, int64_t left_stride, int64_t right_stride, int64_t out_stride,
    const bool adds, const float* left, const float* right, float* out, bool packed);
}

static AOTITorchError aoti_torch_cpu_iql_plugins_product(
    AtenTensorHandle out, AtenTensorHandle left, AtenTensorHandle right) {
  struct Matrix {
    float* data;
    int64_t *sizes, *strides;
    explicit Matrix(AtenTensorHandle tensor) {
      void* pointer;
      aoti_torch_get_data_ptr(tensor, &pointer);
      aoti_torch_get_sizes(tensor, &sizes);
      aoti_torch_get_strides(tensor, &strides);
      data = static_cast<float*>(pointer);
    }
  };
  const Matrix a(left), b(right), c(out);
  const int64_t rows = c.sizes[0], columns = c.sizes[1], inner = a.sizes[1];
  if (a.strides[1] != 1 || b.strides[1] != 1 || c.strides[1] != 1) return AOTI_TORCH_FAILURE;
  // Blocks that stay in the cache, and enough of them for all threads.
  int64_t height = 64, width = 256;
  const auto blocks = [&] { return ((rows + height - 1) / height) * ((columns + width - 1) / width); };
  const int64_t threads = omp_get_max_threads();
  while (blocks() < threads && height > 16) height /= 2;
  while (blocks() < threads && width > 64) width /= 2;
  // What leaves a parallel region by itself ends the process.
  std::atomic<bool> failed{false};
#pragma omp parallel for collapse(2) schedule(static) if (threads > 1 && blocks() > 1)
  for (int64_t i = 0; i < rows; i += height) {
    for (int64_t j = 0; j < columns; j += width) {
      try {
        at::native::cpublas::brgemm(
            std::min(height, rows - i), std::min(width, columns - j), inner, a.strides[0], b.strides[0], c.strides[0],
            false, a.data + i * a.strides[0], b.data + j, c.data + i * c.strides[0] + j, false);
      } catch (...) {
        failed = true;
      }
    }
  }
  return failed ? AOTI_TORCH_FAILURE : AOTI_TORCH_SUCCESS;
}
