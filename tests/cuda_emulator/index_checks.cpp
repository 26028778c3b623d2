// torch.ops.resnet_fused_cuda_emulated.check_indices: index arithmetic at sizes that no emulated kernel can
// have, against the plain definition in 64 bits. Returns what is wrong, "" if nothing is.
#include <torch/csrc/stable/library.h>

#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/cuda/halo.h"
#include "kernels/cuda/rows.h"

namespace resnet_fused {
namespace cuda {
namespace {

std::string check_division() {
  constexpr uint32_t kLast = (uint32_t{1} << 31) - 1;
  std::vector<uint32_t> divisors;
  for (uint32_t d = 1; d <= 300; ++d) divisors.push_back(d);
  for (uint32_t shift = 9; shift < 31; ++shift)
    for (int near = -2; near <= 2; ++near)
      divisors.push_back((uint32_t{1} << shift) + static_cast<uint32_t>(near));
  for (const uint32_t d : {224u * 224u, 112u * 112u, 1000003u, 2147483647u}) divisors.push_back(d);
  for (const uint32_t d : divisors) {
    const Divisor divisor = make_divisor(d);
    const auto wrong = [&](uint64_t n) {
      return n <= kLast && divide(static_cast<uint32_t>(n), divisor) != n / d;
    };
    for (uint64_t n = 0; n < 1000; ++n)
      if (wrong(n)) return "division of a small number by " + std::to_string(d);
    for (uint64_t multiple = 0, i = 0; multiple <= kLast;
         multiple += uint64_t{d} * (1 + kLast / d / 200), ++i)
      for (int near = -1; near <= 1; ++near)
        if (wrong(multiple + static_cast<uint64_t>(near)))
          return "division near a multiple of " + std::to_string(d);
    if (wrong(kLast)) return "division of the largest number by " + std::to_string(d);
  }
  return "";
}

std::string check_swizzle() {
  for (int rows : {8, 32, 64, 128})
    for (int chunks : {8, 16, 32}) {
      std::set<int> seen;
      for (int row = 0; row < rows; ++row)
        for (int chunk = 0; chunk < chunks; ++chunk) {
          const int at = swizzled_panel(row, chunk, rows);
          if (at < 0 || at >= rows * chunks * kChunkBytes || at % kChunkBytes || !seen.insert(at).second)
            return "two chunks at one place, or one outside of the tile";
        }
      // What one phase of ldmatrix reads, eight rows' chunk, covers all 32 banks.
      for (int first = 0; first < rows; first += 8)
        for (int chunk = 0; chunk < chunks; ++chunk) {
          std::set<int> banks;
          for (int row = first; row < first + 8; ++row)
            banks.insert(swizzled_panel(row, chunk, rows) / 16 % 8);
          if (banks.size() != 8) return "a bank conflict";
        }
    }
  return "";
}

ConvGeometry geometry(int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, int64_t kernel, int64_t stride,
                      int64_t padding, int64_t dilation) {
  ConvGeometry g{n, c,      h,      w,       k,       kernel,   kernel,   0,
                 0, stride, stride, padding, padding, dilation, dilation, 1};
  g.p = conv_output_size(h, kernel, stride, padding, dilation);
  g.q = conv_output_size(w, kernel, stride, padding, dilation);
  return g;
}

// Rows of a plan, all of a small geometry and a sample of a large one, against the definition.
std::string check_plan(const ConvGeometry& g, bool forward) {
  const ConvPlan plan = forward ? plan_forward(g) : plan_dgrad(g);
  const int64_t dest_h = forward ? g.p : g.h, dest_w = forward ? g.q : g.w;
  const int64_t source_h = forward ? g.h : g.p, source_w = forward ? g.w : g.q;
  const int64_t pixels = g.n * dest_h * dest_w;
  int64_t rows = 0, tiles = 0;
  std::set<int64_t> seen;
  for (int f = 0; f < plan.phases; ++f) {
    const Phase& phase = plan.phase[f];
    if (phase.first_tile != tiles) return "tiles with a gap";
    if (phase_of_tile(plan, phase.first_tile) != f) return "the first tile of a phase belongs to another";
    tiles += divide_up(phase.rows, kTileRows);
    if (phase_of_tile(plan, static_cast<int>(tiles - 1)) != f)
      return "the last tile of a phase belongs to another";
    rows += phase.rows;
    if (conv_row(plan, phase, phase.rows).dest != -1) return "a row past the last";
    const int64_t step = pixels < 5000 ? 1 : phase.rows / 997 + 1;
    for (int64_t m = 0; m < phase.rows;
         m = m + step < phase.rows || m == phase.rows - 1 ? m + step : phase.rows - 1) {
      const Row row = conv_row(plan, phase, m);
      if (row.dest < 0 || row.dest >= pixels) return "a destination outside";
      if (step == 1 && !seen.insert(row.dest).second) return "a destination twice";
      const int64_t image = row.dest / (dest_h * dest_w), i = row.dest / dest_w % dest_h,
                    j = row.dest % dest_w;
      std::set<int64_t> expected, found;
      for (int64_t r = 0; r < g.r; ++r)
        for (int64_t s = 0; s < g.s; ++s) {
          int64_t h, w;
          if (forward) {
            h = i * g.stride_h - g.pad_h + r * g.dilation_h;
            w = j * g.stride_w - g.pad_w + s * g.dilation_w;
          } else {
            h = i + g.pad_h - r * g.dilation_h, w = j + g.pad_w - s * g.dilation_w;
            if (h % g.stride_h || w % g.stride_w) continue;
            h /= g.stride_h, w /= g.stride_w;
          }
          if (h < 0 || h >= source_h || w < 0 || w >= source_w) continue;
          expected.insert(((image * source_h + h) * source_w + w) * 16 + r * g.s + s);
        }
      for (int t = 0; t < phase.taps; ++t) {
        const Tap& tap = plan.tap[phase.first_tap + t];
        const int64_t pixel = row.source + int64_t{tap.dh} * plan.source_w + tap.dw;
        if (row.taps >> t & 1) found.insert(pixel * 16 + tap.weight);
        if (forward) {
          const Source source = conv_source(plan, phase, m, tap);
          if (source.inside != (row.taps >> t & 1) || (source.inside && source.pixel != pixel))
            return "two functions that disagree on a source";
        }
      }
      if (expected != found) return "other sources than by the definition";
    }
  }
  if (rows != pixels || plan.tiles != tiles) return "rows that do not cover the destination";
  return "";
}

std::string check_plans() {
  for (int64_t kernel : {1, 3})
    for (int64_t stride : {1, 2})
      for (int64_t padding : {0, 1, 2})
        for (int64_t dilation : {1, 2})
          for (int64_t h : {1, 2, 5, 8, 13})
            for (int64_t w : {1, 3, 6, 9}) {
              const ConvGeometry g = geometry(3, 8, h, w, 8, kernel, stride, padding, dilation);
              if (g.p <= 0 || g.q <= 0) continue;
              for (const bool forward : {true, false}) {
                const std::string wrong = check_plan(g, forward);
                if (wrong.empty()) continue;
                std::ostringstream text;
                text << wrong << ": " << (forward ? "forward" : "input gradient") << " of " << h << " x " << w
                     << ", kernel " << kernel << ", stride " << stride << ", padding " << padding
                     << ", dilation " << dilation;
                return text.str();
              }
            }
  // 2^31 pixels almost: offsets in elements pass 2^40.
  for (int64_t stride : {1, 2})
    for (const bool forward : {true, false}) {
      const ConvGeometry g = geometry(2100, 4096, 1000, 1000, 64, 3, stride, 1, 1);
      if (!conv_supported(g)) return "a large geometry is not supported";
      const std::string wrong = check_plan(g, forward);
      if (!wrong.empty()) return wrong + ": large";
    }
  return "";
}

std::string check_halo(const ConvGeometry& g, bool forward) {
  const HaloPlan plan = halo_plan(g, forward);
  const int64_t pixels = g.n * (forward ? g.p * g.q : g.h * g.w);
  if (plan.positions > kMaxPositions) return "a halo that is too large";
  std::set<int64_t> seen;
  const int step = pixels < 5000 ? 1 : plan.tiles / 97 + 1;
  for (int tile = 0; tile < plan.tiles; tile += step) {
    const HaloTileOrigin origin = halo_tile(plan, tile);
    int rows = 0;
    for (int m = 0; m < kTileRows; ++m) {
      const HaloRow row = halo_row(plan, origin, m);
      rows += row.dest >= 0;
      for (int tap = 0; tap < kHaloTaps; ++tap) {
        const int position = row.position + halo_tap(plan, tap, !forward);
        if (position < 0 || position >= plan.positions) return "a tap outside of the halo";
        if (row.dest < 0) continue;
        const int64_t dest_h = forward ? g.p : g.h, dest_w = forward ? g.q : g.w;
        const int64_t image = row.dest / (dest_h * dest_w), i = row.dest / dest_w % dest_h,
                      j = row.dest % dest_w;
        const int64_t h = forward ? i - g.pad_h + tap / 3 : i + g.pad_h - tap / 3;
        const int64_t w = forward ? j - g.pad_w + tap % 3 : j + g.pad_w - tap % 3;
        const int64_t source_h = forward ? g.h : g.p, source_w = forward ? g.w : g.q;
        const bool inside = h >= 0 && h < source_h && w >= 0 && w < source_w;
        if (halo_source(plan, origin, position) != (inside ? (image * source_h + h) * source_w + w : -1))
          return "another source than by the definition";
      }
      if (row.dest >= pixels || (row.dest >= 0 && step == 1 && !seen.insert(row.dest).second))
        return "a destination outside, or twice";
    }
    if (rows != halo_rows(plan, origin)) return "a wrong count of rows";
  }
  if (step == 1 && static_cast<int64_t>(seen.size()) != pixels) return "destinations that are not covered";
  return "";
}

std::string check_halos() {
  for (const bool forward : {true, false}) {
    for (int64_t n : {1, 2, 3})
      for (int64_t h : {1, 2, 7, 8, 9, 17})
        for (int64_t w : {1, 3, 8, 14, 16, 33})
          for (int64_t padding : {0, 1, 2, 3}) {
            const ConvGeometry g = geometry(n, 8, h, w, 8, 3, 1, padding, 1);
            if (g.p <= 0 || g.q <= 0) continue;
            if (const std::string wrong = check_halo(g, forward); !wrong.empty())
              return "halo: " + wrong + (forward ? ", forward" : ", input gradient");
          }
    const std::string wrong = check_halo(geometry(2100, 4096, 1000, 1000, 64, 3, 1, 1, 1), forward);
    if (!wrong.empty()) return "halo: " + wrong + ": large";
  }
  for (int chunks = 1; chunks < 70; ++chunks) {
    // Every (block, tap, chunk) once, in order, and in at most one step too many.
    int expected = 0;
    const int steps = halo_steps(chunks);
    for (int step = 0; step < steps; ++step) {
      const HaloStep at = halo_step(step, chunks);
      int covered = 0;
      for (int i = 0; i < kChunksPerRow; ++i) covered += at.local * kChunksPerRow + i < kHaloTaps * at.chunks;
      if (covered == 0 || at.block * kChunksPerRow + at.chunks > chunks) return "halo: a step of nothing";
      if (at.block * kChunksPerRow * kHaloTaps + at.local * kChunksPerRow != expected)
        return "halo: steps with a gap";
      expected += covered;
    }
    if (expected != chunks * kHaloTaps) return "halo: steps that do not cover";
  }
  return "";
}

std::string check_splits() {
  for (int64_t total : {1, 7, 128, 129, 1000, 1000000}) {
    for (int64_t each : {1, 3, 128, 5000}) {
      int64_t covered = 0;
      for (int64_t i = 0; i < divide_up(total, each); ++i) {
        const Piece piece = piece_of(i, each, total);
        if (piece.first != covered || piece.count < 1 || piece.count > each)
          return "pieces that do not follow";
        covered += piece.count;
      }
      if (covered != total || piece_of(divide_up(total, each), each, total).count != 0)
        return "pieces do not cover";
    }
    for (int multiprocessors : {1, 4, 108, 132, 148})
      for (int64_t channels : {1, 8, 17, 64, 2048})
        for (int vector : {1, 4, 8}) {
          const RowsShape shape = rows_shape(total, channels, vector, multiprocessors, true);
          if (shape.groups < 1 || (shape.groups - 1) * shape.rows_per_group >= total ||
              shape.groups * shape.rows_per_group < total)
            return "groups of rows that do not cover";
          if (kRowsThreads % shape.strip) return "a strip that does not divide the block";
        }
  }
  for (int multiprocessors : {1, 4, 132})
    for (int64_t c : {8, 64, 2048})
      for (int64_t k : {8, 64, 2048})
        for (int64_t n : {1, 64, 256})
          for (int bytes : {2, 4}) {
            const ConvGeometry g = geometry(n, c, 14, 14, k, 3, 1, 1, 1);
            const WgradSplit split = wgrad_split(g, bytes, multiprocessors);
            const int64_t steps = divide_up(g.n * g.p * g.q, kRowBytes / bytes);
            if (split.splits < 1 || split.splits > 65535) return "a grid that cannot be";
            if ((split.splits - 1) * split.steps >= steps || split.splits * split.steps < steps)
              return "splits that do not cover the reduction";
            if (split.splits > 1 && split.splits * g.k * split.columns * 4 > (int64_t{64} << 20))
              return "partial results of more than 64 MB";
          }
  constexpr int kEven[][3] = {{256, 64, 56}, {128, 160, 32}, {256, 128, 28}, {256, 256, 14}};
  for (const auto& [n, c, size] : kEven) {
    const WgradSplit split = wgrad_split(geometry(n, c, size, size, c, 3, 1, 1, 1), 2, 132);
    const int64_t busiest = divide_up(split.tiles * split.splits, 132) * split.steps;
    if (100 * busiest * 132 > 105 * split.tiles * divide_up(n * size * size, 64))
      return "splits that leave a multiprocessor more than 1.05 of the mean to do";
  }
  for (int64_t groups = 1; groups <= 5000; ++groups) {
    const Segments segments = merge_segments(groups);
    if (segments.groups != groups || segments.count < 1 || int64_t{segments.count} * segments.each < groups ||
        (int64_t{segments.count} - 1) * segments.each >= groups)
      return "segments that do not cover the groups, or an empty one that nobody would be the last of";
    if (segments.each > 16 && segments.each * segments.each >= 2 * groups) return "segments of too many groups";
  }
  return "";
}

std::string check_indices() {
  for (const auto check : {check_division, check_swizzle, check_plans, check_halos, check_splits})
    if (std::string wrong = check(); !wrong.empty()) return wrong;
  return "";
}

// Whether a 3x3 convolution with stride 1 goes by halo tiles.
bool uses_halo(int64_t n, int64_t h, int64_t w, int64_t padding, bool forward) {
  return halo_fits(geometry(n, 8, h, w, 8, 3, 1, padding, 1), forward);
}

// The sum of as many partial results, each of them 1.
double merge_ones(int64_t groups) {
  std::vector<float> partial(partial_floats(groups, 1), 1.0f);
  float sum = 0.0f;
  merge_sums(partial.data(), groups, 1, &sum, {}, {nullptr, 0, 4});
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda_emulated, m) {
  m.def("check_indices() -> str");
  m.def("uses_halo(int n, int h, int w, int padding, bool forward) -> bool");
  m.def("merge_ones(int groups) -> float");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda_emulated, CompositeExplicitAutograd, m) {
  m.impl("check_indices", TORCH_BOX(&check_indices));
  m.impl("uses_halo", TORCH_BOX(&uses_halo));
  m.impl("merge_ones", TORCH_BOX(&merge_ones));
}

}  // namespace cuda
}  // namespace resnet_fused
