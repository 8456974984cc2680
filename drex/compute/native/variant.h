// All kernels, for the instruction set and in the namespace of the place that includes this file.
#include "vectors.h"

#include "attention.h"
#include "layer.h"
#include "logits.h"
#include "noise.h"

const Kernels kernels = {
    {add_norm<float>, add_norm<bfloat16>},
    {gate<float>, gate<bfloat16>},
    {rotate_and_write<float>, rotate_and_write<bfloat16>},
    {attend<float>, attend<bfloat16>},
    {summarise<float>, summarise<bfloat16>},
    {draw<float>, draw<bfloat16>},
};
