#include "bindings/arrays.h"
#include "bindings/context.h"

namespace pyllm::bindings {

void bind_attention(py::module_& module, ContextClass& context) { (void)module, (void)context; }

}  // namespace pyllm::bindings
