// A recorded sequence of kernel calls, replayed with one call. Nodes hold a function and a copy of its arguments; whatever
// changes from step to step (tokens, positions, lengths, block tables) is read through the pointers in them, and checked by the
// functions recorded with them.
#pragma once
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

namespace pyllm::cpu {

class Graph {
 public:
  template <class Args>
  void add(Kernel<Args> kernel, const Args& args, void (*check)(const Args&) = nullptr) {
    static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= sizeof(Node::args));
    Node node;
    node.kernel = reinterpret_cast<void (*)()>(kernel);
    node.call = [](const Node& n, Parallel& pool) {
      reinterpret_cast<Kernel<Args>>(n.kernel)(*reinterpret_cast<const Args*>(n.args), pool);
    };
    if (check) {
      node.check_values = reinterpret_cast<void (*)()>(check);
      node.check = [](const Node& n) {
        reinterpret_cast<void (*)(const Args&)>(n.check_values)(*reinterpret_cast<const Args*>(n.args));
      };
    }
    std::memcpy(node.args, &args, sizeof args);
    nodes_.push_back(node);
  }

  // Throws what the checks throw. All are made before anything is run, and each again before its own kernel, as what an
  // earlier one writes may be what it reads.
  void replay(Parallel& pool) const {
    for (const Node& node : nodes_)
      if (node.check) node.check(node);
    for (const Node& node : nodes_) {
      if (node.check) node.check(node);
      node.call(node, pool);
    }
  }

  size_t size() const { return nodes_.size(); }

 private:
  struct Node {
    void (*kernel)();
    void (*call)(const Node&, Parallel&);
    void (*check_values)() = nullptr;
    void (*check)(const Node&) = nullptr;
    alignas(16) unsigned char args[320];
  };
  std::vector<Node> nodes_;
};

}  // namespace pyllm::cpu
