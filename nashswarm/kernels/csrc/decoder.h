// A forward pass through the blocks of a language model, as kernels/decoder.py describes it to the library.
#pragma once

#include "trellis.h"

namespace nashswarm {

struct DecoderMatrix {  // trellis-coded
    const uint8_t* content;  // null: there is none
    const int64_t* starts;
    const float* bias;  // null: none
};

struct DecoderNorm {
    const float* weight;  // null: the norm is left out
    const float* bias;    // null: none
    float offset, reserved;  // is added to the weights
};

struct DecoderTable {  // rows of an embedding
    DecoderMatrix matrix;
    int64_t rows;
    const float* floats;  // if there is no matrix; null: there is no such embedding
};

struct DecoderBlock {
    DecoderMatrix attention[3];  // whose outputs, one after another, are queries, keys and values
    DecoderMatrix output, inner[2], down;
    DecoderNorm before_attention, after_attention, before_inner, after_inner, query, key;
    int64_t window;  // tokens that a token attends to, with itself; 0: all
    float scale, reserved;  // of the scores
};

enum Activation : int64_t { SILU, GELU_TANH, GELU };

struct Decoder {
    int64_t blocks, hidden, heads, key_heads, head_size, rotated, inner, vocabulary;
    int64_t gated, activation, layer_norm;  // layer_norm: else the norms are root mean squares
    int64_t joint_norms;                    // norms of queries and keys take all heads together
    float epsilon, head_epsilon;
    float embedding_scale;
    float clip;                  // of queries, keys and values; 0: none
    float score_cap, logit_cap;  // a cap c makes c · tanh(x / c) of x; 0: none
    DecoderTable tokens, places;
    DecoderNorm norm;
    DecoderMatrix head;
    const DecoderBlock* block;
};

// The keys and values of a sequence in a block: [key head][capacity][head size].
struct DecoderCache {
    float *keys, *values;
    int64_t capacity;
    int64_t shift;  // the place in the sequence of the first key
};

// The tokens of a pass, those of a sequence side by side and in their order.
struct DecoderPass {
    int64_t count;
    const int64_t* ids;
    const int64_t* sequences;
    const int64_t* places;     // in their sequence, of which the cache holds all before
    const int64_t* firsts;     // the first place of the sequence that is no padding
    const int64_t* positions;  // that rotations and embeddings of positions take
    const float* cosines;      // [position][rotated / 2]
    const float* sines;
    const DecoderCache* caches;  // [sequence][block]
    int64_t wanted;             // tokens whose logits are computed
    const int64_t* wanted_tokens;
    float* logits;  // [wanted][vocabulary]
};

// Rows of queries that attend to the keys and values of one head.
struct Attention {
    const float* queries;  // of the first head of the first token
    int64_t stride;        // floats from a token to the next
    int64_t tokens, heads, size;
    const float* keys;  // [place][size]
    const float* values;
    const int64_t* begins;  // by token: the first place that it attends to
    const int64_t* ends;    // by token: the place after the last, in ascending order
    float scale, cap;
    float* output;  // like queries
    int64_t output_stride;
};

// What an instruction set computes beside products.
struct DecoderSteps {
    void (*norm)(const float* x, const DecoderNorm& norm, bool layer_norm, float epsilon, int64_t size, float* out);
    void (*add)(float* x, const float* y, int64_t size);
    void (*cap)(float* x, float scale, float cap, int64_t size);  // of x times scale
    void (*rotate)(float* head, const float* cosines, const float* sines, int64_t rotated);
    // scratch: attention_floats.
    void (*attend)(const Attention&, float* scratch);
    void (*activate)(const float* inner, bool gated, Activation activation, int64_t size, float* out);
};

constexpr int64_t PACKED_KEYS = 16;  // keys that are transposed together

// The floats that `attend` needs for rows (tokens times heads) that attend to so many places.
constexpr int64_t attention_floats(int64_t rows, int64_t places, int64_t size) {
    return rows * (places + PACKED_KEYS) + PACKED_KEYS * size;
}

extern const DecoderSteps decoder_portable;
#if defined(__x86_64__)
extern const DecoderSteps decoder_avx2, decoder_avx512;
#endif

}  // namespace nashswarm
