// Weights that several Models may have: they are freed with the last one.
#pragma once

#include "llama.h"

#include <memory>

namespace mullama {

using Handle = std::shared_ptr<llama_model>;

inline Handle own(llama_model * model) { return Handle(model, llama_model_free); }

} // namespace mullama
