// Fused passes over the activations of a training step, for which torch has nothing fast on a CPU.
//
// They read and write tensors [images, channels, height, width] stored channels last, in fp32 or
// bfloat16, a few channels at a time, and compute in fp32. The processor's cores share the work;
// no result depends on how many there are. `cpu.py` calls the passes.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "vectors.h"

namespace {

using at::Tensor;

// Sums are taken over groups of 64 positions, then over the groups: one long sum of fp32 numbers
// that are alike would lose digits.
constexpr int64_t GROUP = 64;

int64_t count_groups(const Tensor& x) { return (x.numel() / x.size(1) + GROUP - 1) / GROUP; }

Tensor make_sums(const Tensor& x) {
  return at::zeros({count_groups(x), 2, x.size(1)}, x.options().dtype(at::kFloat));
}

// Calls f(group, channel, offset) for each vector of LANES channels, in the order of memory.
template <class F>
void for_each_vector(const Tensor& x, F f) {
  const int64_t channels = x.size(1);
  at::parallel_for(0, count_groups(x), 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++) {
      int64_t at = group * GROUP * channels;
      const int64_t last = std::min(at + GROUP * channels, x.numel());
      while (at < last)
        for (int64_t channel = 0; channel < channels; channel += LANES, at += LANES)
          f(group, channel, at);
    }
  });
}

// Calls f with a number of the tensor's element type, float or bfloat16.
template <class F>
void for_type_of(const Tensor& x, F f) {
  if (x.scalar_type() == at::kBFloat16)
    f(BFloat16{});
  else
    f(float{});
}

void check(const Tensor& x, const Tensor& like) {
  TORCH_CHECK(x.sizes() == like.sizes() && x.scalar_type() == like.scalar_type());
  TORCH_CHECK(x.dim() == 4 && x.size(1) % LANES == 0);
  TORCH_CHECK(x.is_contiguous(at::MemoryFormat::ChannelsLast));
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

const float* check_sums(const Tensor& sums, const Tensor& like) {
  TORCH_CHECK(sums.dim() == 2 && sums.size(0) == 2 && sums.size(1) == like.size(1));
  TORCH_CHECK(sums.is_contiguous());
  return sums.const_data_ptr<float>();
}

const float* check_channels(const Tensor& x, const Tensor& like) {
  TORCH_CHECK(x.dim() == 1 && x.size(0) == like.size(1) && x.is_contiguous());
  return x.const_data_ptr<float>();
}

// gelu(z), the slope there, and the sums of gelu(z) - center and of its square: [2, channels].
std::tuple<Tensor, Tensor, Tensor> activate(const Tensor& z, const Tensor& center) {
  check(z, z);
  Tensor y = at::empty_like(z), slope = at::empty_like(z), sums = make_sums(z);
  const int64_t channels = z.size(1);
  for_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    const T* from = z.const_data_ptr<T>();
    T *to = y.data_ptr<T>(), *to_slope = slope.data_ptr<T>();
    const float* centers = check_channels(center, z);
    float* sum = sums.data_ptr<float>();
    for_each_vector(z, [=](int64_t group, int64_t channel, int64_t at) {
      Floats value, derivative;
      gelu(load(from + at), value, derivative);
      store(to + at, value);
      store(to_slope + at, derivative);
      value -= load(centers + channel);
      add(sum + 2 * group * channels + channel, value);
      add(sum + (2 * group + 1) * channels + channel, value * value);
    });
  });
  return {y, slope, sums.sum(0)};
}

// BatchNorm of y, by the sums from `activate` over `count` values per channel; mean and variance.
std::tuple<Tensor, Tensor, Tensor> normalize(const Tensor& y, const Tensor& sums,
                                             const Tensor& center, const Tensor& weight,
                                             const Tensor& bias, int64_t count, double eps) {
  check(y, y);
  const int64_t channels = y.size(1);
  Tensor result = at::empty_like(y), mean = at::empty_like(center), variance = mean.clone();
  const float *of_deviation = check_sums(sums, y), *of_square = of_deviation + channels;
  const float *centers = check_channels(center, y), *weights = check_channels(weight, y);
  const float* biases = check_channels(bias, y);
  float *means = mean.data_ptr<float>(), *variances = variance.data_ptr<float>();
  std::vector<float> scales(channels), shifts(channels);
  for (int64_t i = 0; i < channels; i++) {
    const float offset = of_deviation[i] / count;
    means[i] = centers[i] + offset;
    variances[i] = std::max(of_square[i] / count - offset * offset, 0.0f);
    scales[i] = weights[i] / std::sqrt(variances[i] + eps);
    shifts[i] = biases[i] - means[i] * scales[i];
  }
  for_type_of(y, [&](auto zero) {
    using T = decltype(zero);
    const T* from = y.const_data_ptr<T>();
    T* to = result.data_ptr<T>();
    const float *scale = scales.data(), *shift = shifts.data();
    for_each_vector(y, [=](int64_t, int64_t channel, int64_t at) {
      store(to + at, load(scale + channel) * load(from + at) + load(shift + channel));
    });
  });
  return {result, mean, variance};
}

// The sums of grad and of grad * (y - mean): [2, channels].
Tensor sum_gradient(const Tensor& grad, const Tensor& y, const Tensor& mean) {
  check(grad, y), check(y, y);
  Tensor sums = make_sums(y);
  const int64_t channels = y.size(1);
  for_type_of(y, [&](auto zero) {
    using T = decltype(zero);
    const T *gradients = grad.const_data_ptr<T>(), *values = y.const_data_ptr<T>();
    const float* means = check_channels(mean, y);
    float* sum = sums.data_ptr<float>();
    for_each_vector(y, [=](int64_t group, int64_t channel, int64_t at) {
      Floats g = load(gradients + at);
      add(sum + 2 * group * channels + channel, g);
      add(sum + (2 * group + 1) * channels + channel,
          g * (load(values + at) - load(means + channel)));
    });
  });
  return sums.sum(0);
}

// The gradient of z: back through BatchNorm, by the sums from `sum_gradient`, and through GELU.
// With s = weight / std and means over the batch, it is
//   slope * s * (grad - mean(grad) - (y - mean) / variance * mean(grad * (y - mean))),
// here with one factor of grad, one of y and one constant per channel.
Tensor input_gradient(const Tensor& grad, const Tensor& y, const Tensor& slope, const Tensor& sums,
                      const Tensor& weight, const Tensor& mean, const Tensor& variance,
                      int64_t count, double eps) {
  check(grad, y), check(slope, y), check(y, y);
  const int64_t channels = y.size(1);
  Tensor result = at::empty_like(y);
  const float *of_grad = check_sums(sums, y), *of_product = of_grad + channels;
  const float *weights = check_channels(weight, y), *means = check_channels(mean, y);
  const float* variances = check_channels(variance, y);
  std::vector<float> factors(channels), y_factors(channels), constants(channels);
  for (int64_t i = 0; i < channels; i++) {
    const float inverse = 1 / (variances[i] + eps);
    factors[i] = weights[i] * std::sqrt(inverse);
    y_factors[i] = -factors[i] * inverse * of_product[i] / count;
    constants[i] = -factors[i] * of_grad[i] / count - y_factors[i] * means[i];
  }
  for_type_of(y, [&](auto zero) {
    using T = decltype(zero);
    const T *gradients = grad.const_data_ptr<T>(), *values = y.const_data_ptr<T>();
    const T* slopes = slope.const_data_ptr<T>();
    T* to = result.data_ptr<T>();
    const float *a = factors.data(), *b = y_factors.data(), *c = constants.data();
    for_each_vector(y, [=](int64_t, int64_t channel, int64_t at) {
      Floats combined = load(a + channel) * load(gradients + at) + load(c + channel);
      combined += load(b + channel) * load(values + at);
      store(to + at, load(slopes + at) * combined);
    });
  });
  return result;
}

// Sums of products for one image and LANES channels: grad with x shifted by each of the K * K
// offsets of the kernel, and grad alone (the gradient of the bias).
//
// x and grad point at the first of the channels; sums is [K * K + 1, channels]. Scratch space in
// fp32: `wide` is an image with K / 2 more columns on both sides, zero at first; `copy` holds grad.
template <int K, class T>
void sum_products(const T* x, const T* grad, float* sums, float* wide, float* copy,
                  int64_t height, int64_t width, int64_t channels) {
  constexpr int PADDING = K / 2;
  const int64_t row = (width + 2 * PADDING) * LANES;
  Floats bias{};
  for (int64_t i = 0; i < height; i++) {
    Floats of_row{};
    for (int64_t j = 0; j < width; j++) {
      const int64_t at = (i * width + j) * channels;
      Floats g = load(grad + at);
      of_row += g;
      store(copy + (i * width + j) * LANES, g);
      store(wide + i * row + (j + PADDING) * LANES, load(x + at));
    }
    bias += of_row;
  }
  store(sums + K * K * channels, bias);
  for (int64_t down = -PADDING; down <= PADDING; down++) {
    Floats products[K] = {};  // of one row of the kernel: these stay in registers
    const int64_t last = std::min(height, height - down);
    for (int64_t i = std::max<int64_t>(0, -down); i < last; i++)
      for (int64_t j = 0; j < width; j++) {
        Floats g = load(copy + (i * width + j) * LANES);
        const float* window = wide + (i + down) * row + j * LANES;
#pragma GCC unroll 9
        for (int k = 0; k < K; k++) products[k] += load(window + k * LANES) * g;
      }
    for (int k = 0; k < K; k++)
      store(sums + ((down + PADDING) * K + k) * channels, products[k]);
  }
}

template <int K>
void sum_products(const Tensor& x, const Tensor& grad, Tensor& sums) {
  const int64_t images = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t size = channels * height * width;
  for_type_of(x, [&](auto zero) {
    using T = decltype(zero);
    const T *xs = x.const_data_ptr<T>(), *grads = grad.const_data_ptr<T>();
    float* to = sums.data_ptr<float>();
    at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> wide(height * (width + K - 1) * LANES), copy(height * width * LANES);
      for (int64_t image = begin; image < end; image++)
        for (int64_t channel = 0; channel < channels; channel += LANES)
          sum_products<K>(xs + image * size + channel, grads + image * size + channel,
                          to + image * (K * K + 1) * channels + channel, wide.data(), copy.data(),
                          height, width, channels);
    });
  });
}

// The gradients, in fp32, of weight [channels, 1, kernel_size, kernel_size] and of bias [channels]
// of a depthwise convolution with stride 1 and "same" padding.
std::tuple<Tensor, Tensor> depth_wise_gradients(const Tensor& x, const Tensor& grad,
                                                int64_t kernel_size) {
  check(x, grad), check(grad, grad);
  const int64_t channels = x.size(1), products = kernel_size * kernel_size;
  Tensor sums = at::empty({x.size(0), products + 1, channels}, x.options().dtype(at::kFloat));
  switch (kernel_size) {
    case 3: sum_products<3>(x, grad, sums); break;
    case 5: sum_products<5>(x, grad, sums); break;
    case 7: sum_products<7>(x, grad, sums); break;
    case 9: sum_products<9>(x, grad, sums); break;
    default: TORCH_CHECK(false, "kernel_size is ", kernel_size);
  }
  sums = sums.sum(0);
  Tensor weight = sums.narrow(0, 0, products).t().reshape({channels, 1, kernel_size, kernel_size});
  return {weight, sums[products]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(convmixer_hub, library) {
  library.def("activate", activate);
  library.def("normalize", normalize);
  library.def("sum_gradient", sum_gradient);
  library.def("input_gradient", input_gradient);
  library.def("depth_wise_gradients", depth_wise_gradients);
}
