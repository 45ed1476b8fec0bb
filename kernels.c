/*
The few operations from which a CPU gains at least 3% of a whole training step or of a decoded token.
Everything else runs as plain PyTorch. kernels.py compiles this file at first use and calls it through
ctypes. The formulas and the PyTorch references stand in kernels.py and optim.py.

All tensors are contiguous fp32. The first argument of each function is the number of threads. The order of
every sum is independent of the threads, so the same input gives the same bits on any number of cores.

The compiler's command line defines LANES, ROWS and EPS, whose values stand in kernels.py. The second half of
the file is compiled only where N, the number of residual streams, is defined too: 2, 4 or 8.
*/
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EACH_CHANNEL _Pragma("omp simd") for (int64_t c = 0; c < C; c++)
#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))


/* --- RMSNorm: y = x r w, r = 1 / sqrt(mean(x^2) + eps) --- */

/* X, Y (rows, C); w (C) or NULL for a weight of 1 */
void rmsnorm_forward(int threads, int64_t rows, int64_t C, float eps, const float *X, const float *w,
                     float *Y) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float *x = X + i * C;
        float *restrict y = Y + i * C, square = 0;
        #pragma omp simd reduction(+ : square)
        for (int64_t c = 0; c < C; c++) square += x[c] * x[c];
        float r = 1 / sqrtf(square / C + eps);
        if (w) EACH_CHANNEL y[c] = x[c] * r * w[c];
        else EACH_CHANNEL y[c] = x[c] * r;
    }
}

/* g_x = r (w g - x r^2 mean(w g x)). g_w (rows / ROWS, C): sums of g x r over ROWS rows at a time. */
void rmsnorm_backward(int threads, int64_t rows, int64_t C, float eps, const float *X, const float *w,
                      const float *G, float *g_x, float *g_w) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < (rows + ROWS - 1) / ROWS; block++) {
        float *restrict sums = g_w + block * C;
        if (w) EACH_CHANNEL sums[c] = 0;
        for (int64_t i = block * ROWS; i < (block + 1) * ROWS && i < rows; i++) {
            const float *x = X + i * C, *g = G + i * C;
            float *restrict to = g_x + i * C, square = 0, dot = 0;
            if (w) {
                #pragma omp simd reduction(+ : square, dot)
                for (int64_t c = 0; c < C; c++) square += x[c] * x[c], dot += w[c] * g[c] * x[c];
            } else {
                #pragma omp simd reduction(+ : square, dot)
                for (int64_t c = 0; c < C; c++) square += x[c] * x[c], dot += g[c] * x[c];
            }
            float r = 1 / sqrtf(square / C + eps), back = dot / C * r * r;
            if (w) EACH_CHANNEL to[c] = r * (w[c] * g[c] - x[c] * back), sums[c] += g[c] * x[c] * r;
            else EACH_CHANNEL to[c] = r * (g[c] - x[c] * back);
        }
    }
}


/* --- short convolution: y_t = x_t + sum over i < K of w_i x_(t-i), channel by channel --- */

/* X, Y (rows, C): texts of T rows each. w (K, C) */
void short_conv_forward(int threads, int64_t rows, int64_t T, int64_t C, int64_t K, const float *X,
                        const float *w, float *Y) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float *x = X + i * C;
        float *restrict y = Y + i * C;
        EACH_CHANNEL y[c] = x[c] + w[c] * x[c];
        for (int64_t k = 1, t = i % T; k < K && k <= t; k++)
            EACH_CHANNEL y[c] += w[k * C + c] * x[c - k * C];
    }
}

/* g_x_t = g_t + sum of w_i g_(t+i). g_w (rows / ROWS, K, C): sums of g_t x_(t-i) over ROWS rows at a time. */
void short_conv_backward(int threads, int64_t rows, int64_t T, int64_t C, int64_t K, const float *X,
                         const float *w, const float *G, float *g_x, float *g_w) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < (rows + ROWS - 1) / ROWS; block++) {
        float *restrict sums = g_w + block * K * C;
        memset(sums, 0, K * C * sizeof *sums);
        for (int64_t i = block * ROWS; i < (block + 1) * ROWS && i < rows; i++) {
            const float *x = X + i * C, *g = G + i * C;
            float *restrict to = g_x + i * C;
            int64_t t = i % T;
            EACH_CHANNEL to[c] = g[c] + w[c] * g[c];
            for (int64_t k = 1; k < K && t + k < T; k++) EACH_CHANNEL to[c] += w[k * C + c] * g[c + k * C];
            for (int64_t k = 0; k < K && k <= t; k++) EACH_CHANNEL sums[k * C + c] += g[c] * x[c - k * C];
        }
    }
}


/* --- a few rows times a large matrix: Y (rows, n_out) = X (rows, n_in) W^T, W (n_out, n_in) --- */

typedef float lanes __attribute__((vector_size(4 * LANES)));

static inline lanes load_lanes(const float *p) { /* memcpy, because the address need not be aligned */
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Four outputs for up to four rows of X: 16 sums stay in registers. Each number of W is loaded once for
   all rows. */
INLINE void tile(int outs, int rows, int64_t n_out, int64_t n_in, const float *W, const float *X,
                 float *Y) {
    lanes sums[4][4] = {0};
    int64_t i = 0;
    for (; i + LANES <= n_in; i += LANES) {
        lanes x[4];
        UNROLL for (int r = 0; r < rows; r++) x[r] = load_lanes(X + r * n_in + i);
        UNROLL for (int o = 0; o < outs; o++) {
            lanes w = load_lanes(W + o * n_in + i);
            UNROLL for (int r = 0; r < rows; r++) sums[o][r] += w * x[r];
        }
    }
    UNROLL for (int o = 0; o < outs; o++) {
        UNROLL for (int r = 0; r < rows; r++) {
            float sum = 0;
            for (int l = 0; l < LANES; l++) sum += sums[o][r][l];
            for (int64_t j = i; j < n_in; j++) sum += W[o * n_in + j] * X[r * n_in + j];
            Y[r * n_out + o] = sum;
        }
    }
}

/* The number of rows is a constant in each call of tile, so the compiler unrolls every case. */
INLINE void tiles(int outs, int64_t rows, int64_t n_out, int64_t n_in, const float *W, const float *X,
                  float *Y) {
    for (; rows >= 4; rows -= 4, X += 4 * n_in, Y += 4 * n_out) tile(outs, 4, n_out, n_in, W, X, Y);
    if (rows == 3) tile(outs, 3, n_out, n_in, W, X, Y);
    if (rows == 2) tile(outs, 2, n_out, n_in, W, X, Y);
    if (rows == 1) tile(outs, 1, n_out, n_in, W, X, Y);
}

void few_rows(int threads, int64_t rows, int64_t n_out, int64_t n_in, const float *W, const float *X,
              float *Y) {
    int64_t fours = n_out / 4 * 4;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < fours; o += 4) tiles(4, rows, n_out, n_in, W + o * n_in, X, Y + o);
    for (int64_t o = fours; o < n_out; o++) tiles(1, rows, n_out, n_in, W + o * n_in, X, Y + o);
}


/* --- optimizers, over n tensors: P[i] weights, G[i] gradients, M[i] momentum, each of sizes[i] numbers. The
   numbers in comments are lines of FAdam's algorithm. Python passes 1 - beta, because 1 - 0.999f computed in
   fp32 would be off by 1.3e-5 of itself. --- */

#define CHUNK 4096 /* squares of so many weights are summed in fp32; the chunks' sums are added up in fp64 */

/* F[i]: Fisher information. news[i]: 1 - beta2 of this step. s: [1 - beta1, lr, weight_decay, eps, eps2,
   clip]. The first walk sums, the second updates. A tensor whose epsilon is below eps is summed again. */
void fadam(int threads, int64_t n, float **P, float **G, float **M, float **F, const int64_t *sizes,
           const float *news, const float *s) {
    float new1 = s[0], lr = s[1], weight_decay = s[2], eps2 = s[4], clip = s[5];
    for (int64_t i = 0; i < n; i++) {
        float *restrict p = P[i], *restrict m = M[i], *restrict f = F[i], new2 = news[i], eps = s[3];
        const float *restrict g = G[i];
        int64_t size = sizes[i], chunks = (size + CHUNK - 1) / CHUNK;
        float(*sums)[3] = malloc(chunks * sizeof *sums);
        double gg, nn, ww; /* sums of squares: gradient, natural gradient, natural weights */
        for (;;) {
            #pragma omp parallel for num_threads(threads) schedule(static)
            for (int64_t c = 0; c < chunks; c++) {
                int64_t end = (c + 1) * CHUNK < size ? (c + 1) * CHUNK : size;
                float a = 0, x = 0, y = 0;
                #pragma omp simd reduction(+ : a, x, y)
                for (int64_t j = c * CHUNK; j < end; j++) {
                    float inverse = 1 / (sqrtf(f[j] + new2 * (g[j] * g[j] - f[j])) + eps);
                    a += g[j] * g[j];
                    x += (g[j] * inverse) * (g[j] * inverse);
                    y += (p[j] * inverse) * (p[j] * inverse);
                }
                sums[c][0] = a, sums[c][1] = x, sums[c][2] = y;
            }
            gg = nn = ww = 0;
            for (int64_t c = 0; c < chunks; c++) gg += sums[c][0], nn += sums[c][1], ww += sums[c][2];
            float adaptive = eps2 * sqrt(gg / size); /* 8 */
            if (!(adaptive > 0 && adaptive < eps)) break; /* also where it is NaN */
            eps = adaptive;
        }
        free(sums);
        float fresh = new1 / fmax(1, sqrt(nn / size) / clip); /* 10 */
        float decay = weight_decay / fmax(1, sqrt(ww / size) / clip); /* 13 */
        #pragma omp parallel for simd num_threads(threads) schedule(static)
        for (int64_t j = 0; j < size; j++) {
            f[j] += new2 * (g[j] * g[j] - f[j]); /* 7 */
            float inverse = 1 / (sqrtf(f[j]) + eps);
            m[j] += fresh * (g[j] * inverse) - new1 * m[j]; /* 9, 11 */
            p[j] -= lr * (m[j] + decay * (p[j] * inverse)); /* 12, 14 */
        }
    }
}

/* counts[i] blocks of sizes[i] weights. V[i]: one second moment for each block. rates: step size and
   correction of v, for each tensor. s: [1 - beta1, 1 - beta2, eps, 1 - lr weight_decay]. One walk is enough:
   the gradient of a block is still in the cache when its mean square is known. */
void adam_mini(int threads, int64_t n, float **P, float **G, float **M, float **V, const int64_t *counts,
               const int64_t *sizes, const float *rates, const float *s) {
    float new1 = s[0], new2 = s[1], eps = s[2], keep = s[3];
    #pragma omp parallel num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        int64_t size = sizes[i];
        #pragma omp for schedule(static) nowait
        for (int64_t b = 0; b < counts[i]; b++) {
            float *restrict p = P[i] + b * size, *restrict m = M[i] + b * size, *v = V[i] + b, square = 0;
            const float *restrict g = G[i] + b * size;
            #pragma omp simd reduction(+ : square)
            for (int64_t j = 0; j < size; j++) square += g[j] * g[j];
            *v += new2 * (square / size - *v);
            float scale = rates[2 * i] / (sqrtf(*v / rates[2 * i + 1]) + eps);
            #pragma omp simd
            for (int64_t j = 0; j < size; j++) {
                m[j] += new1 * (g[j] - m[j]);
                p[j] = keep * p[j] - scale * m[j];
            }
        }
    }
}


#ifdef N

/* --- residual streams, X (tokens, N, C). A token's N C numbers stay in the first cache while each is used
   N times. --- */

#define EACH_TOKEN \
    _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t t = 0; t < tokens; t++)

static inline float dot(int64_t C, const float *restrict a, const float *restrict b) {
    float total = 0;
    for (int64_t start = 0; start < C; start += 128) { /* short chains of additions round less */
        int64_t end = start + 128 < C ? start + 128 : C;
        float sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int64_t c = start; c < end; c++) sum += a[c] * b[c];
        total += sum;
    }
    return total;
}

/* u = sum_i pre_i x_i: pre (tokens, N), u (tokens, C) */
void read_forward(int threads, int64_t tokens, int64_t C, const float *X, const float *pre, float *u) {
    EACH_TOKEN {
        const float *x = X + t * N * C, *p = pre + t * N;
        float *restrict out = u + t * C;
        EACH_CHANNEL {
            float sum = 0;
            UNROLL for (int i = 0; i < N; i++) sum += p[i] * x[i * C + c];
            out[c] = sum;
        }
    }
}

void read_backward(int threads, int64_t tokens, int64_t C, const float *X, const float *pre,
                   const float *G, float *g_x, float *g_pre) {
    EACH_TOKEN {
        const float *x = X + t * N * C, *g = G + t * C;
        for (int i = 0; i < N; i++) {
            float p = pre[t * N + i], *restrict to = g_x + (t * N + i) * C;
            EACH_CHANNEL to[c] = p * g[c];
            g_pre[t * N + i] = dot(C, g, x + i * C);
        }
    }
}

/* out_o = sum_i res_oi x_i + post_o y. Y (tokens, C), post (tokens, N), res (tokens, N, N), out as X */
void write_forward(int threads, int64_t tokens, int64_t C, const float *X, const float *Y,
                   const float *post, const float *res, float *out) {
    EACH_TOKEN {
        const float *x = X + t * N * C, *y = Y + t * C;
        for (int o = 0; o < N; o++) {
            const float *r = res + (t * N + o) * N;
            float p = post[t * N + o], *restrict to = out + (t * N + o) * C;
            EACH_CHANNEL {
                float sum = p * y[c];
                UNROLL for (int i = 0; i < N; i++) sum += r[i] * x[i * C + c];
                to[c] = sum;
            }
        }
    }
}

void write_backward(int threads, int64_t tokens, int64_t C, const float *X, const float *Y,
                    const float *post, const float *res, const float *G, float *g_x, float *g_y,
                    float *g_post, float *g_res) {
    EACH_TOKEN {
        const float *x = X + t * N * C, *y = Y + t * C, *g = G + t * N * C;
        const float *r = res + t * N * N, *p = post + t * N;
        float *restrict to_y = g_y + t * C;
        for (int i = 0; i < N; i++) {
            float *restrict to = g_x + (t * N + i) * C;
            EACH_CHANNEL {
                float sum = 0;
                UNROLL for (int o = 0; o < N; o++) sum += r[o * N + i] * g[o * C + c];
                to[c] = sum;
            }
        }
        EACH_CHANNEL {
            float sum = 0;
            UNROLL for (int o = 0; o < N; o++) sum += p[o] * g[o * C + c];
            to_y[c] = sum;
        }
        for (int o = 0; o < N; o++) {
            g_post[t * N + o] = dot(C, g + o * C, y);
            for (int i = 0; i < N; i++) g_res[(t * N + o) * N + i] = dot(C, g + o * C, x + i * C);
        }
    }
}


/* --- Sinkhorn. LANES matrices at a time, transposed so that entry k of all of them lies together:
   m[k][lane]. Every operation is then LANES wide whatever N is, and sums need no shuffles. A row costs one
   division. --- */

typedef float matrices[N * N][LANES];

/* e^x as 2^k e^r with |r| < ln(2) / 2, within 1.1 units of the last place. NaN stays NaN. The compiler can
   vectorise these operations, but not libm's exponential. Adding 1.5 * 2^23 rounds to an integer k and leaves
   k in the low bits. 2^k comes in two factors, so that the result overflows and underflows as it should. */
static inline float exponential(float x) {
    union { float f; uint32_t i; } t, low, high;
    x = x < -105 ? -105 : x;
    x = x > 89 ? 89 : x;
    t.f = x * 1.44269504f + 12582912.0f;
    float k = t.f - 12582912.0f;
    /* ln 2 in two parts. The first has so few bits that k times it is exact. */
    float r = x - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 0.0013814222f; /* minimax polynomial of e^r */
    p = p * r + 0.0083688991f, p = p * r + 0.041668404f;
    p = p * r + 0.1666652f, p = p * r + 0.49999994f;
    p = p * (r * r) + r + 1;
    int32_t n = (int32_t)(t.i - 0x4B400000u), half = n >> 1;
    low.i = (uint32_t)(half + 127) << 23, high.i = (uint32_t)(n - half + 127) << 23;
    return p * low.f * high.f;
}

/* `count` rows of `width` numbers, which begin `apart` from each other. Lanes beyond `count` hold zeros and
   are never stored. */
static void load(const float *x, int64_t apart, int64_t count, int width, float (*m)[LANES]) {
    for (int k = 0; k < width; k++)
        for (int l = 0; l < LANES; l++) m[k][l] = l < count ? x[l * apart + k] : 0;
}

static void store(float *x, int64_t apart, int64_t count, int width, float (*m)[LANES]) {
    for (int l = 0; l < count; l++)
        for (int k = 0; k < width; k++) x[l * apart + k] = m[k][l];
}

static void softmax(float (*m)[LANES]) { /* over rows, for each column j */
    for (int j = 0; j < N; j++) {
        #pragma omp simd
        for (int l = 0; l < LANES; l++) {
            float most = m[j][l], sum = 0;
            UNROLL for (int i = 1; i < N; i++) most = m[i * N + j][l] > most ? m[i * N + j][l] : most;
            UNROLL for (int i = 0; i < N; i++) sum += m[i * N + j][l] = exponential(m[i * N + j][l] - most);
            float inverse = 1 / sum;
            UNROLL for (int i = 0; i < N; i++) m[i * N + j][l] *= inverse;
        }
    }
}

/* y = x / (sum of x + EPS) over N entries that lie `step` apart, for N groups that lie `group` apart.
   group, step = N, 1 normalises rows; 1, N normalises columns. `inverse` keeps one over each sum. */
static inline void normalise(float (*x)[LANES], float (*y)[LANES], float (*inverse)[LANES], int group,
                             int step) {
    UNROLL for (int a = 0; a < N; a++) {
        #pragma omp simd
        for (int l = 0; l < LANES; l++) {
            float sum = 0;
            UNROLL for (int b = 0; b < N; b++) sum += x[a * group + b * step][l];
            float by = inverse[a][l] = 1 / (sum + EPS);
            UNROLL for (int b = 0; b < N; b++) y[a * group + b * step][l] = x[a * group + b * step][l] * by;
        }
    }
}

/* The gradient of normalise: y = x / s gives g_x = (g_y - sum(g_y * y)) / s. */
static inline void normalise_back(float (*g)[LANES], float (*y)[LANES], float (*inverse)[LANES],
                                  int group, int step) {
    UNROLL for (int a = 0; a < N; a++) {
        #pragma omp simd
        for (int l = 0; l < LANES; l++) {
            float dot = 0;
            UNROLL for (int b = 0; b < N; b++) dot += g[a * group + b * step][l] * y[a * group + b * step][l];
            UNROLL for (int b = 0; b < N; b++)
                g[a * group + b * step][l] = (g[a * group + b * step][l] - dot) * inverse[a][l];
        }
    }
}

static void iterate(float (*m)[LANES], int64_t iters) { /* logits -> H, in place */
    float inverse[N][LANES];
    softmax(m);
    for (int k = 0; k < N * N; k++)
        for (int l = 0; l < LANES; l++) m[k][l] += EPS;
    normalise(m, m, inverse, N, 1);
    for (int64_t i = 1; i < iters; i++) normalise(m, m, inverse, 1, N), normalise(m, m, inverse, N, 1);
}

/* p: the logits, overwritten. g: the gradient of H, turned into that of the logits. scratch keeps all
   iterates and divisors of these LANES matrices. They stay in the cache: 40 kB at N = 4 and 20 iterations. */
static void iterate_back(float (*p)[LANES], float (*g)[LANES], int64_t iters, float *scratch) {
    int64_t steps = 2 * iters - 1; /* even steps normalise rows, odd ones columns */
    matrices *ys = (matrices *)scratch, m;
    float(*inverse)[N][LANES] = (float(*)[N][LANES])(ys + steps);
    softmax(p);
    for (int k = 0; k < N * N; k++)
        for (int l = 0; l < LANES; l++) m[k][l] = p[k][l] + EPS;
    normalise(m, ys[0], inverse[0], N, 1);
    for (int64_t i = 1; i < steps; i += 2) {
        normalise(ys[i - 1], ys[i], inverse[i], 1, N);
        normalise(ys[i], ys[i + 1], inverse[i + 1], N, 1);
    }
    for (int64_t i = steps - 1; i > 0; i -= 2) {
        normalise_back(g, ys[i], inverse[i], N, 1);
        normalise_back(g, ys[i - 1], inverse[i - 1], 1, N);
    }
    normalise_back(g, ys[0], inverse[0], N, 1);
    for (int j = 0; j < N; j++) { /* the softmax: g_x = p (g_p - sum(g_p * p)) */
        for (int l = 0; l < LANES; l++) {
            float dot = 0;
            for (int i = 0; i < N; i++) dot += g[i * N + j][l] * p[i * N + j][l];
            for (int i = 0; i < N; i++) g[i * N + j][l] = (g[i * N + j][l] - dot) * p[i * N + j][l];
        }
    }
}

/* floats that iterate_back needs for each thread */
#define SCRATCH(iters) ((2 * (iters) - 1) * (N * N + N) * LANES)
/* how many of LANES there are from `first` on */
#define LEFT(count, first) ((count) - (first) < LANES ? (count) - (first) : LANES)

void sinkhorn_forward(int threads, int64_t count, int64_t iters, const float *x, float *y) {
    int64_t blocks = (count + LANES - 1) / LANES;
    #pragma omp parallel for num_threads(threads) schedule(static) if (blocks > 8)
    for (int64_t b = 0; b < blocks; b++) {
        matrices m;
        int64_t first = b * LANES, left = LEFT(count, first);
        load(x + first * N * N, N * N, left, N * N, m);
        iterate(m, iters);
        store(y + first * N * N, N * N, left, N * N, m);
    }
}

void sinkhorn_backward(int threads, int64_t count, int64_t iters, const float *x, const float *g_y,
                       float *g_x, float *scratch) {
    int64_t blocks = (count + LANES - 1) / LANES;
    #pragma omp parallel for num_threads(threads) schedule(static, 1) if (blocks > 8)
    for (int t = 0; t < threads; t++) {
        for (int64_t b = blocks * t / threads; b < blocks * (t + 1) / threads; b++) {
            matrices p, g;
            int64_t first = b * LANES, left = LEFT(count, first);
            load(x + first * N * N, N * N, left, N * N, p);
            load(g_y + first * N * N, N * N, left, N * N, g);
            iterate_back(p, g, iters, scratch + t * SCRATCH(iters));
            store(g_x + first * N * N, N * N, left, N * N, g);
        }
    }
}


/* --- mHC's coefficients, LANES tokens at a time. The products with phi are left to BLAS. --- */

#define COLUMNS (2 * N + N * N) /* of phi: [pre | post | logits of the mixing matrix] */
#define PART(k) ((k >= N) + (k >= 2 * N))
typedef float columns[COLUMNS][LANES];

/* For the `left` tokens from `first` on: z r in `normed`, r, and x = alpha z r + b */
static void logits(int64_t first, int64_t left, float eps, const float *z, const float *square,
                   const float *alpha, const float *b, float (*normed)[LANES], float *r,
                   float (*x)[LANES]) {
    load(z + first * COLUMNS, COLUMNS, left, COLUMNS, normed);
    for (int l = 0; l < LANES; l++) r[l] = 1 / sqrtf((l < left ? square[first + l] : 0) + eps);
    for (int k = 0; k < COLUMNS; k++) {
        float a = alpha[PART(k)], c = b[k];
        for (int l = 0; l < LANES; l++) normed[k][l] *= r[l], x[k][l] = a * normed[k][l] + c;
    }
}

static void sigmoid_of_gates(float (*x)[LANES]) { /* columns of pre and post */
    for (int k = 0; k < 2 * N; k++)
        for (int l = 0; l < LANES; l++) x[k][l] = 1 / (1 + exponential(-x[k][l]));
}

/* H (tokens, width), z (tokens, COLUMNS) -> square (tokens), pre, post (tokens, N), res (tokens, N, N) */
void mhc_forward(int threads, int64_t tokens, int64_t width, int64_t iters, float eps, const float *H,
                 const float *z, const float *alpha, const float *b, float *square, float *pre,
                 float *post, float *res) {
    #pragma omp parallel for num_threads(threads) schedule(static) if (tokens > LANES)
    for (int64_t first = 0; first < tokens; first += LANES) {
        int64_t left = LEFT(tokens, first);
        float r[LANES];
        columns normed, x;
        for (int64_t t = first; t < first + left; t++) {
            const float *h = H + t * width;
            float sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < width; c++) sum += h[c] * h[c];
            square[t] = sum / width;
        }
        logits(first, left, eps, z, square, alpha, b, normed, r, x);
        sigmoid_of_gates(x);
        for (int k = N; k < 2 * N; k++)
            for (int l = 0; l < LANES; l++) x[k][l] *= 2;
        iterate(x + 2 * N, iters);
        store(pre + first * N, N, left, N, x);
        store(post + first * N, N, left, N, x + N);
        store(res + first * N * N, N * N, left, N * N, x + 2 * N);
    }
}

/* g_z (tokens, COLUMNS). factor (tokens): the gradient through r is factor times x. sums: [g_alpha | g_b] of
   each LANES tokens, 3 + COLUMNS numbers, which Python adds up in fp64. */
void mhc_backward(int threads, int64_t tokens, int64_t width, int64_t iters, float eps, const float *z,
                  const float *square, const float *alpha, const float *b, const float *g_pre,
                  const float *g_post, const float *g_res, float *g_z, float *factor, float *sums,
                  float *scratch) {
    int64_t blocks = (tokens + LANES - 1) / LANES;
    #pragma omp parallel for num_threads(threads) schedule(static, 1) if (blocks > 1)
    for (int t = 0; t < threads; t++) {
        for (int64_t i_b = blocks * t / threads; i_b < blocks * (t + 1) / threads; i_b++) {
            int64_t first = i_b * LANES, left = LEFT(tokens, first);
            float r[LANES], back[LANES] = {0}, *to = sums + i_b * (3 + COLUMNS);
            columns normed, x, g;
            logits(first, left, eps, z, square, alpha, b, normed, r, x);
            load(g_pre + first * N, N, left, N, g);
            load(g_post + first * N, N, left, N, g + N);
            load(g_res + first * N * N, N * N, left, N * N, g + 2 * N);
            sigmoid_of_gates(x);
            for (int k = 0; k < 2 * N; k++) /* post = 2 sigmoid */
                for (int l = 0; l < LANES; l++) g[k][l] *= (1 + PART(k)) * x[k][l] * (1 - x[k][l]);
            iterate_back(x + 2 * N, g + 2 * N, iters, scratch + t * SCRATCH(iters));
            to[0] = to[1] = to[2] = 0;
            for (int k = 0; k < COLUMNS; k++) {
                float a = alpha[PART(k)], sum = 0, dot = 0;
                #pragma omp simd reduction(+ : sum, dot)
                for (int l = 0; l < LANES; l++) {
                    sum += g[k][l], dot += g[k][l] * normed[k][l];
                    back[l] += a * g[k][l] * normed[k][l], g[k][l] *= a * r[l];
                }
                to[3 + k] = sum, to[PART(k)] += dot;
            }
            store(g_z + first * COLUMNS, COLUMNS, left, COLUMNS, g);
            for (int l = 0; l < left; l++) factor[first + l] = -back[l] * r[l] * r[l] / width;
        }
    }
}

#endif
