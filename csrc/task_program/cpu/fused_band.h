// Fused conv-norm-pool bands: a convolution of few channels, and the batch norm, ReLU and 2 x 2 max
// pool behind it. Computing the convolution's outputs again beats reading them from memory. So
// they, their gradients and tangents exist only for a band of lines at a time, in the L2 cache.
// (First layer of Conv4-64 on 75 images of 28 x 28: 15 MB an array and 34 million multiplications.)
// No gradient of the images. Threads that share a task take ranges of its images; their sums merge
// in the order of the ranges.
#pragma once

#include "convolution/cpu/convolution.h"
#include "execution/cpu/images.h"
#include "task_program/layers/norm.h"

namespace fastmeta {

// Lines of all images, an even number except at an image's end; in a part of them that a thread
// takes, whose first line is `first`.
struct Band : Interval {
  int64_t part, first;
};

// Bands of a convolution's outputs, and memory for three arrays of one band of each part.
template <typename value_t>
class CpuBands {
 public:
  static int64_t scratch(const ConvShape& s) {
    return 3 * s.weight_size() + CpuConvolution<value_t>::scratch(s) + 3 * band_size(s) +
           kMoments * s.outputs;
  }

  CpuBands(const ConvShape& shape, int64_t examples, int64_t threads, value_t* scratch)
      : shape_(shape),
        examples_(examples),
        parts_(std::min(threads, examples)),
        sum_(shape, examples, false),
        memory_(scratch) {}

  int64_t parts() const { return parts_; }
  // Images [begin, end) of a part.
  Interval images(int64_t part) const {
    return {examples_ * part / parts_, examples_ * (part + 1) / parts_};
  }

  // Calls body on bands, part by part in order.
  template <typename Body>
  void for_each(const Body& body) const {
    const int64_t height = shape_.out_height(), step = band_lines(shape_);
    parallel_for(0, parts_, 1, [&](int64_t begin, int64_t end) {
      const OneBlasThread one;
      for (int64_t part = begin; part < end; ++part) {
        const Interval of_part = images(part);
        for (int64_t image = of_part.begin; image < of_part.end; ++image) {
          const int64_t top = image * height, bottom = top + height;
          for (int64_t line = top; line < bottom; line += step) {
            body(Band{{line, std::min(bottom, line + step)}, part, of_part.begin * height});
          }
        }
      }
    });
  }

  // Two sums or moments of each channel over a part; the first part keeps them in `all`.
  value_t* sums(int64_t part, value_t* all) const {
    return part == 0 ? all : bands(part) + 3 * band_size(shape_);
  }

  // Packs weights for outputs(), in slot `which` of two.
  const value_t* packed(const value_t* w, int which) const {
    return sum_.packed(w, weights(which));
  }

  // Array of a band, in slot `which` of three. Its pointer is shifted as if all other bands were
  // stored too.
  Array<value_t> array(const Band& band, int which) const {
    return {bands(band.part) + which * band_size(shape_) - band.begin * line_size(shape_), 0};
  }
  Array<value_t> outputs(const Band& band, const value_t* x, const value_t* packed,
                         int which) const {
    const auto z = array(band, which);
    sum_.output_rows(rows(band), x, packed, z.data, own(band.part));
    return z;
  }

  // Adds a band's share to the gradient of the weights.
  void join_weights(const Band& band, const Array<value_t>& dz, const value_t* x) const {
    sum_.weight_rows(rows(band), dz.data, x, weights(2, band.part), band.begin > band.first,
                     own(band.part));
  }
  void write_weights(const StoreMode<value_t>& into, value_t* dw) const {
    for (int64_t part = 1; part < parts_; ++part) {
      add_to(weights(2, part), shape_.weight_size(), weights(2));
    }
    const value_t scale = into.step_size ? -into.step_size.data[0] : value_t(1);
    sum_.write_weights(weights(2), into.adds, scale, weights(0), dw);
  }

  Interval rows(const Interval& band) const {
    return {band.begin * shape_.out_width(), band.end * shape_.out_width()};
  }

 private:
  static constexpr int64_t kBandBytes = 128 << 10, kMoments = 2;

  static int64_t line_size(const ConvShape& s) { return s.out_width() * s.outputs; }
  static int64_t band_lines(const ConvShape& s) {
    const int64_t line_bytes = line_size(s) * static_cast<int64_t>(sizeof(value_t));
    return std::max<int64_t>(2, kBandBytes / line_bytes / 2 * 2);
  }
  static int64_t band_size(const ConvShape& s) { return band_lines(s) * line_size(s); }

  value_t* weights(int which, int64_t part = 0) const {
    return memory_ + part * scratch(shape_) + which * shape_.weight_size();
  }
  value_t* own(int64_t part) const { return weights(3, part); }
  value_t* bands(int64_t part) const {
    return own(part) + CpuConvolution<value_t>::scratch(shape_);
  }

  ConvShape shape_;
  int64_t examples_, parts_;
  CpuConvolution<value_t> sum_;
  value_t* memory_;
};

// Passes of both layers. The statistics and sums are the norm's.
template <typename Executor>
class CpuFusedBand {
 public:
  using value_t = typename Executor::storage_t;
  using Arena = Array<value_t>;

  CpuFusedBand(Executor& exec, const Network<value_t>& net, const Instruction& conv,
               const Instruction& norm, int64_t threads, value_t* scratch)
      : exec_(exec),
        net_(net),
        conv_(conv),
        norm_{net, norm},
        x_(net.value(conv.x).data),
        bands_(conv.conv, net.examples.count, threads, scratch) {}

  void forward() const {
    const auto l = norm_.arrays(false);
    const CpuImages<value_t> in(l.in, false), out(l.out, false);
    const value_t* w = bands_.packed(net_.parameter(conv_.weight).data, 0);
    bands_.for_each([&](const Band& band) {
      const auto z = bands_.outputs(band, x_, w, 0);
      // Moments are of the positions of a part.
      const auto rows = bands_.rows(band);
      const int64_t first = bands_.rows({band.first, band.first}).begin;
      in.join_moments(z.data + first * conv_.outputs, rows.begin - first, rows.end - first,
                      bands_.sums(band.part, l.statistics.data));
    });
    const int64_t positions = conv_.conv.out_positions();
    for (int64_t part = 1; part < bands_.parts(); ++part) {
      const auto images = bands_.images(part);
      in.merge_moments(images.begin * positions, images.size() * positions,
                       bands_.sums(part, nullptr), l.statistics.data);
    }
    norm_.statistics(exec_, l);
    bands_.for_each([&](const Band& band) {
      auto part = l;
      part.x = bands_.outputs(band, x_, w, 0);
      const auto lines = pooled(band, l);
      out.table_of_lines(lines.begin, lines.end, NormForward<Form, value_t>{part});
    });
  }

  void tangent_forward() const {
    const auto l = norm_.arrays(true);
    const CpuImages<value_t> in(l.in, false), out(l.out, false);
    const auto weights = both_weights();
    const auto base = without_tangent(l);
    if (weights.w_dot != nullptr) {
      bands_.for_each([&](const Band& band) {
        auto part = base;
        part.x = bands_.outputs(band, x_, weights.w, 0);
        part.x_dot = bands_.outputs(band, x_, weights.w_dot, 1);
        in.join_sums(band.first, band.begin, band.end, NormTangentSums<value_t>{part},
                     bands_.sums(band.part, l.statistics_dot.data));
      });
      join_parts(l.statistics_dot);
      norm_.means(exec_, l, l.statistics_dot, {}, {}, {});
    }
    bands_.for_each([&](const Band& band) {
      auto part = base;
      if (weights.w_dot != nullptr) part.x_dot = bands_.outputs(band, x_, weights.w_dot, 1);
      const auto lines = pooled(band, l);
      out.table_of_lines(lines.begin, lines.end, NormTangentForward<Form, value_t>{part});
    });
  }

  template <typename Update>
  void backward(ParameterGradient<value_t> grads, bool adds, const Update& update) const {
    const auto l = norm_.arrays(false);
    exec_.column_sums(l.out, true, NormBackwardSums<Form, value_t>{l}, l.sums);
    norm_.means(exec_, l, l.sums, l.weight, {}, {});
    if (const auto target = grads.at(conv_.weight)) {
      const value_t* w = bands_.packed(net_.parameter(conv_.weight).data, 0);
      make_weights({adds || conv_.adds_to_weight}, target, [&](const Band& band, Arena dz) {
        auto part = l;
        part.x = bands_.outputs(band, x_, w, 0);
        part.dx = dz;
        return NormBackward<Form, value_t>{part};
      });
      const auto finish = update.from(conv_.weight);
      if constexpr (!std::is_same_v<std::decay_t<decltype(finish)>, NoFinish>) {
        exec_.map(conv_.conv.weight_size(), finish);
      }
    }
    norm_.parameter_gradients(exec_, l, l.sums, grads, {adds}, update);
  }

  void tangent_backward(ParameterGradient<value_t> target, const StoreMode<value_t>& into) const {
    const auto l = norm_.arrays(true);
    const CpuImages<value_t> out(l.out, false);
    const auto weights = both_weights();
    const auto base = without_tangent(l);
    bands_.for_each([&](const Band& band) {
      auto part = base;
      if (weights.w_dot != nullptr) part.x_dot = bands_.outputs(band, x_, weights.w_dot, 1);
      const auto lines = pooled(band, l);
      const int64_t first = band.first / l.in.height * l.out.height;
      out.join_sums(first, lines.begin, lines.end, NormTangentBackwardSums<Form, value_t>{part},
                    bands_.sums(band.part, l.sums_dot.data));
    });
    join_parts(l.sums_dot);
    norm_.means(exec_, l, l.sums_dot, l.weight, l.sums, l.weight_dot);
    if (const auto weight = target.at(conv_.weight)) {
      const bool adapts = weights.w_dot != nullptr;
      make_weights(into.or_adds(conv_.adds_to_weight), weight, [&](const Band& band, Arena dz_dot) {
        auto part = base;
        part.x = bands_.outputs(band, x_, weights.w, 0);
        if (adapts) part.x_dot = bands_.outputs(band, x_, weights.w_dot, 1);
        part.dx_dot = dz_dot;
        return NormTangentBackward<Form, value_t>{part};
      });
    }
    norm_.parameter_gradients(exec_, l, l.sums_dot, target, into, NoUpdate{});
  }

 private:
  using Form = NormForm<true, true>;

  struct Weights {
    const value_t *w, *w_dot;  // packed; w_dot null if not adapted
  };
  Weights both_weights() const {
    const auto w_dot = net_.tangent_of(conv_.weight);
    return {bands_.packed(net_.parameter(conv_.weight).data, 0),
            w_dot ? bands_.packed(w_dot.data, 1) : nullptr};
  }

  // The arrays without a tangent of the convolution's outputs, which have no memory. It is zero if
  // the weight is not adapted, also where the bias is: the norm takes it away again.
  static NormArrays<value_t> without_tangent(NormArrays<value_t> l) {
    l.x_dot = {};
    return l;
  }

  // Adds the sums of the other parts to the sums of the first.
  void join_parts(Arena sums) const {
    for (int64_t part = 1; part < bands_.parts(); ++part) {
      add_to(bands_.sums(part, nullptr), 2 * conv_.outputs, sums.data);
    }
  }

  // Lines of the pool's outputs that come from a band.
  static Interval pooled(const Interval& band, const NormArrays<value_t>& l) {
    const int64_t image = band.begin / l.in.height, first = image * l.in.height;
    const auto line = [&](int64_t of_band) {
      return image * l.out.height + std::min(l.out.height, (of_band - first) / 2);
    };
    return {line(band.begin), line(band.end)};
  }

  // Computes the gradient of the weights from the gradient of the outputs, or from its tangent;
  // make(band, array) fills this in.
  template <typename Make>
  void make_weights(const StoreMode<value_t>& into, Arena target, const Make& make) const {
    bands_.for_each([&](const Band& band) {
      const auto dz = bands_.array(band, 2);
      const auto fill = make(band, dz);
      CpuImages<value_t>(fill.l.in, false).table_of_lines(band.begin, band.end, fill);
      bands_.join_weights(band, dz, x_);
    });
    bands_.write_weights(into, target.data);
  }

  Executor& exec_;
  const Network<value_t>& net_;
  const Instruction& conv_;
  NormLayer<value_t> norm_;
  const value_t* x_;
  CpuBands<value_t> bands_;
};

}  // namespace fastmeta
