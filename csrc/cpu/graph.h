// A recorded sequence of kernel calls, replayed with one call. Nodes hold a function and a copy of its arguments; whatever
// changes from step to step (tokens, positions, lengths, block tables) is read through the pointers in them.
#pragma once
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

namespace pyllm::cpu {

class Graph {
 public:
  template <class Args>
  void add(Kernel<Args> kernel, const Args& args) {
    static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= sizeof(Node::args));
    Node node;
    node.kernel = reinterpret_cast<void (*)()>(kernel);
    node.call = [](const Node& n, Parallel& pool) {
      reinterpret_cast<Kernel<Args>>(n.kernel)(*reinterpret_cast<const Args*>(n.args), pool);
    };
    std::memcpy(node.args, &args, sizeof args);
    nodes_.push_back(node);
  }

  void replay(Parallel& pool) const {
    for (const Node& node : nodes_) node.call(node, pool);
  }

  size_t size() const { return nodes_.size(); }

 private:
  struct Node {
    void (*kernel)();
    void (*call)(const Node&, Parallel&);
    alignas(16) unsigned char args[192];
  };
  std::vector<Node> nodes_;
};

}  // namespace pyllm::cpu
