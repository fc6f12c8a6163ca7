// The layers of a ConvMixer in inference, each in two passes: depthwise convolution, GELU, scale and
// residual connection; then 1x1 convolution, GELU, scale and shift. `inference.py` says what scale and
// shift are.
//
// Features are [images, channels, height, width], stored channels last, in fp32.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

using at::Tensor;

// Results that are summed up in registers at a time: of COLUMNS positions in the depthwise
// convolution, and of ROWS positions and VECTORS of channels in the 1x1 convolution.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 12;  // there are 32 registers
#else
constexpr int ROWS = 6;  // there are 16
#endif
constexpr int COLUMNS = 8, VECTORS = 2;
constexpr int64_t PANEL = 32;      // channels whose weights lie together
constexpr int64_t KEPT = 1 << 19;  // numbers in the memory that stays with a thread

// Exact GELU, z times the normal distribution's cdf, to 5e-7: max(z, 0) - |z| cdf(-|z|), where the cdf
// is 1/2 p(|z|)^-16 with a polynomial p (as Abramowitz & Stegun 7.1.28). For negative z there is no
// difference of nearly equal numbers, whose error BatchNorm may multiply by hundreds.
// The one in vectors.h, which has the derivative, too, takes longer.
inline Floats gelu(Floats z) {
  Floats distance = z < 0.0f ? -z : z;
  Floats p = 1.58679124e-7f * distance - 1.12848105e-6f;
  p = ((p * distance + 7.45001297e-6f) * distance + 5.08750648e-5f) * distance + 2.77119594e-5f;
  p = ((p * distance + 3.28896555e-3f) * distance + 2.11363144e-2f) * distance + 4.98679359e-2f;
  p = p * distance + 1.0f;
  p *= p;  // p^2
  p *= p;  // p^4
  p *= p;
  p *= p;  // p^16
  return (z < 0.0f ? Floats{} : z) - 0.5f * distance / p;
}

const float* read(const Tensor& x, int64_t count) {
  TORCH_CHECK(x.numel() == count && x.is_contiguous());
  return x.const_data_ptr<float>();
}

// x + scale * gelu(depthwise convolution of x), for one image and LANES channels.
//
// x, y, weight [K * K, channels], bias and scale point at the first of the channels. Scratch space:
// `padded` is an image with K / 2 zeros around it, and more to the right; zero at first.
template <int K>
void mix_positions(const float* x, float* y, const float* weight, const float* bias,
                   const float* scale, float* padded, int64_t height, int64_t width,
                   int64_t channels) {
  const int64_t row = (width + COLUMNS + K - 2) * LANES;
  Floats weights[K * K];
  for (int k = 0; k < K * K; k++) weights[k] = load(weight + k * channels);
  for (int64_t i = 0; i < height; i++)
    for (int64_t j = 0; j < width; j++)
      store(padded + (i + K / 2) * row + (j + K / 2) * LANES, load(x + (i * width + j) * channels));
  for (int64_t i = 0; i < height; i++)
    for (int64_t j = 0; j < width; j += COLUMNS) {
      Floats sums[COLUMNS];
      for (int n = 0; n < COLUMNS; n++) sums[n] = load(bias);
      for (int down = 0; down < K; down++) {
        const float* window = padded + (i + down) * row + j * LANES;
#pragma GCC unroll 16
        for (int at = 0; at < COLUMNS + K - 1; at++) {
          Floats value = load(window + at * LANES);
#pragma GCC unroll 9
          for (int k = 0; k < K; k++)
            if (at >= k && at - k < COLUMNS) sums[at - k] += value * weights[down * K + k];
        }
      }
      for (int64_t n = 0; n < std::min<int64_t>(COLUMNS, width - j); n++) {
        const int64_t at = (i * width + j + n) * channels;
        store(y + at, load(x + at) + load(scale) * gelu(sums[n]));
      }
    }
}

template <int K>
void mix_positions(const Tensor& x, Tensor& y, const float* weight, const float* bias,
                   const float* scale) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t groups = channels / LANES;
  const float* from = x.const_data_ptr<float>();
  float* to = y.data_ptr<float>();
  at::parallel_for(0, x.size(0) * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> padded((height + K - 1) * (width + COLUMNS + K - 2) * LANES);
    for (int64_t i = begin; i < end; i++) {
      const int64_t channel = i % groups * LANES;
      const int64_t at = i / groups * channels * height * width + channel;
      mix_positions<K>(from + at, to + at, weight + channel, bias + channel,
                       scale + channel, padded.data(), height, width, channels);
    }
  });
}

// shift + scale * gelu(1x1 convolution of x), with weight [channels / PANEL, inputs, PANEL].
void mix_channels(const Tensor& x, Tensor& y, const float* weight, const float* bias,
                  const float* scale, const float* shift) {
  const int64_t inputs = x.size(1), channels = y.size(1), positions = x.numel() / inputs;
  const float* from = x.const_data_ptr<float>();
  float* to = y.data_ptr<float>();
  at::parallel_for(0, (positions + ROWS - 1) / ROWS, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> last_rows(ROWS * inputs);
    for (int64_t first = begin * ROWS; first < std::min(end * ROWS, positions); first += ROWS) {
      const int64_t count = std::min<int64_t>(ROWS, positions - first);
      const float* rows = from + first * inputs;
      if (count < ROWS) {
        std::copy_n(rows, count * inputs, last_rows.data());
        rows = last_rows.data();
      }
      for (int64_t channel = 0; channel < channels; channel += VECTORS * LANES) {
        Floats sums[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++)
          for (int v = 0; v < VECTORS; v++) sums[r][v] = load(bias + channel + v * LANES);
        const float* panel = weight + channel / PANEL * PANEL * inputs + channel % PANEL;
        for (int64_t k = 0; k < inputs; k++, panel += PANEL) {
          Floats weights[VECTORS];
          for (int v = 0; v < VECTORS; v++) weights[v] = load(panel + v * LANES);
#pragma GCC unroll 12
          for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) sums[r][v] += rows[r * inputs + k] * weights[v];
        }
        for (int64_t r = 0; r < count; r++)
          for (int v = 0; v < VECTORS; v++) {
            const int64_t c = channel + v * LANES;
            Floats result = load(shift + c) + load(scale + c) * gelu(sums[r][v]);
            store(to + (first + r) * channels + c, result);
          }
      }
    }
  });
}

// Features after the last layer.
//
// `patches` [images, inputs, height, width] has the pixels of a patch as channels. `parameters` are
// weight, bias, scale and shift of the stem; then for each layer weight, bias and scale of the
// depthwise convolution, and weight, bias, scale and shift of the 1x1 convolution. See above for how
// weights are laid out.
Tensor map_features(const Tensor& patches, at::TensorList parameters) {
  TORCH_CHECK(patches.is_contiguous(at::MemoryFormat::ChannelsLast));
  TORCH_CHECK(parameters.size() % 7 == 4);
  const int64_t inputs = patches.size(1), channels = parameters[1].numel();
  TORCH_CHECK(channels % PANEL == 0);
  Tensor x = at::empty({patches.size(0), channels, patches.size(2), patches.size(3)},
                       patches.options(), at::MemoryFormat::ChannelsLast);
  // A small block is kept: given back, the kernel would clear it for every part of a batch.
  thread_local std::vector<float> kept(KEPT);
  const bool is_small = x.numel() <= KEPT;
  Tensor y = is_small ? at::from_blob(kept.data(), x.sizes(), x.strides(), x.options())
                      : at::empty_like(x);
  auto parameter = parameters.begin();
  auto next = [&](int64_t count) { return read(*parameter++, count * channels); };
  auto mix = [&](const Tensor& from, Tensor& to) {
    const float* weight = next(from.size(1));
    const float *bias = next(1), *scale = next(1), *shift = next(1);
    mix_channels(from, to, weight, bias, scale, shift);
  };
  mix(patches, x);
  while (parameter != parameters.end()) {
    const int64_t kernel = parameter->size(0);
    const float* weight = next(kernel);
    const float *bias = next(1), *scale = next(1);
    switch (kernel) {
      case 9: mix_positions<3>(x, y, weight, bias, scale); break;
      case 25: mix_positions<5>(x, y, weight, bias, scale); break;
      case 49: mix_positions<7>(x, y, weight, bias, scale); break;
      case 81: mix_positions<9>(x, y, weight, bias, scale); break;
      default: TORCH_CHECK(false, "a depthwise kernel has ", kernel, " weights");
    }
    mix(y, x);
  }
  return x;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(convmixer_hub, library) {
  library.def("map_features(Tensor patches, Tensor[] parameters) -> Tensor");
}

// For the CPU alone, so that tracing sees one operator rather than what it is made of.
TORCH_LIBRARY_IMPL(convmixer_hub, CPU, library) { library.impl("map_features", map_features); }
