// The search of minift/ops/nf4_shift.py, LANES blocks of N ascending numbers at a time.

// columns[n * blocks + b]: number n of block b. candidates[f * blocks + b]: what to try, in this order. lacks[c]: how
// much c equal codes take away from the entropy. Of blocks [begin, end), the first candidate that lacks least.
void nf4_shifts(const float* columns, const Bf16* candidates, const int64_t* lacks, int64_t size,
                int64_t num_candidates, int64_t blocks, int64_t begin, int64_t end, Bf16* best) {
  for (int64_t b = begin; b < end; b += LANES) {
    int64_t count = end - b < LANES ? end - b : LANES;
    int64_t least[LANES];
    for (int64_t f = 0; f < num_candidates; ++f) {
      const Bf16* tried = candidates + f * blocks + b;
      const float *smallest = columns + b, *largest = columns + (size - 1) * blocks + b;
      bool is_whole = count == LANES;
      F32 shift = is_whole ? load(tried) : load(tried, count);
      F32 low = (is_whole ? load(smallest) : load(smallest, count)) - shift;
      F32 high = (is_whole ? load(largest) : load(largest, count)) - shift;
      F32 inverse = 1.0f / at_least(at_least(-low, high), splat(nf4::SMALLEST_DIVISOR));
      I32 up_to[15] = {};  // the numbers that a threshold does not exceed
      for (int64_t n = 0; n < size; ++n) {
        const float* at = columns + n * blocks + b;
        F32 normalised = ((is_whole ? load(at) : load(at, count)) - shift) * inverse;
        for (int t = 0; t < 15; ++t) up_to[t] -= normalised <= nf4::THRESHOLDS[t];
      }
      for (int64_t lane = 0; lane < count; ++lane) {
        int64_t lack = lacks[size - up_to[14][lane]] + lacks[up_to[0][lane]];
        for (int t = 1; t < 15; ++t) lack += lacks[up_to[t][lane] - up_to[t - 1][lane]];
        if (f == 0 || lack < least[lane]) {
          least[lane] = lack;
          best[b + lane] = tried[lane];
        }
      }
    }
  }
}
