// The cut machine in Python: messages are bytes of the wire, actions are tuples of their fields.
//
// An action is (name, field, ...), a Send is ("Send", to, bytes); values inside are tuples, too.
// spotspeed/core/cut_tuples.py gives them their types back.
#include <string>

#include "bindings_fields.h"
#include "cut.h"

namespace py = pybind11;
using namespace spotspeed;

namespace {

constexpr const char* kActionNames[] = {"Send",     "Decided",  "Capture",   "Settled",
                                        "Departed", "PeerLost", "AllClosed", "Exchanged"};

py::list list_of(const cut::Actions& actions) {
  py::list found;
  for (const cut::Action& action : actions) {
    const char* name = kActionNames[action.index()];
    found.append(std::visit(
        [name](const auto& body) -> py::object {
          if constexpr (std::is_same_v<std::decay_t<decltype(body)>, cut::Send>) {
            return py::make_tuple(name, body.to, py::bytes(cut::encode(body.term, body.message)));
          } else {
            return py::make_tuple(name) + fields_of(body);
          }
        },
        action));
  }
  return found;
}

cut::Timing to_timing(const std::array<double, 7>& times) {
  return {times[0], times[1], times[2], times[3], times[4], times[5], times[6]};
}

// Everything that another twin must agree with after every event.
py::tuple observe(cut::Machine& machine) {
  const cut::Gate& gate = machine.gate();
  const cut::Member& member = machine.member();
  py::list rounds;
  for (const auto& [round, held] : member.rounds()) {
    rounds.append(py::make_tuple(round, static_cast<int>(held.phase), held.is_settled,
                                 held.deadline));
  }
  const std::vector<std::int64_t> lost(machine.lost().begin(), machine.lost().end());
  return py::make_tuple(static_cast<int>(machine.state()), to_python(machine.missing()),
                        py::make_tuple(machine.term().counter, machine.term().leader),
                        to_python(lost),
                        py::make_tuple(gate.started(), gate.completed(), gate.limit(),
                                       gate.ceiling()),
                        member.top_round(), member.is_fenced(), member.waiting_since, rounds,
                        machine.wake());
}

using Machine = cut::Machine;

}  // namespace

void bind_cut(py::module_& module) {
  py::register_exception<cut::FormatError>(module, "MessageFormatError", PyExc_ValueError);
  module.def("reencode_message", [](const std::string& data) {
    const auto [term, message] = cut::decode(data);
    return py::bytes(cut::encode(term, message));
  });
  py::class_<Machine>(module, "CutMachine")
      .def(py::init([](std::int64_t rank, std::int64_t world_size, std::int64_t position,
                       const std::array<double, 7>& timing, double unix_offset_s) {
             return std::make_unique<Machine>(
                 Machine::Setup{rank, world_size, position, to_timing(timing), unix_offset_s});
           }),
           py::arg("rank"), py::arg("world_size"), py::kw_only(), py::arg("position") = 0,
           py::arg("timing"), py::arg("unix_offset_s") = 0.0)
      .def("notice",
           [](Machine& machine, int wish, cut::OptionalTime left, std::string source, double now) {
             if (wish < 1 || wish > 3) throw py::value_error("a wish is 1, 2 or 3");
             return list_of(machine.notice(static_cast<cut::Wish>(wish), left,
                                             std::move(source), now));
           })
      .def("enter", &Machine::enter)
      .def("completed", [](Machine& m, std::int64_t position,
                           double now) { return list_of(m.completed(position, now)); })
      .def("staged", [](Machine& m, std::int64_t round,
                        double now) { return list_of(m.staged(round, now)); })
      .def("durable", [](Machine& m, std::int64_t round, cut::OptionalText digest,
                         double now) { return list_of(m.durable(round, digest, now)); })
      .def("failed", [](Machine& m, std::int64_t round, const std::string& why,
                        double now) { return list_of(m.failed(round, why, now)); })
      .def("delivered", [](Machine& m, std::int64_t round,
                           double now) { return list_of(m.delivered(round, now)); })
      .def("gather",
           [](Machine& m, std::string label, const py::bytes& value, double now) {
             auto [serial, actions] = m.gather(std::move(label), {std::string(value)}, now);
             return py::make_tuple(serial, list_of(actions));
           })
      .def("peer_down", [](Machine& m, std::int64_t rank, const std::string& why,
                           double now) { return list_of(m.peer_down(rank, why, now)); })
      .def("tick", [](Machine& m, double now) { return list_of(m.tick(now)); })
      .def("receive",
           [](Machine& m, std::int64_t sender, const std::string& data, double now) {
             const auto [term, message] = cut::decode(data);
             return list_of(m.receive(sender, term, message, now));
           })
      .def("observe", &observe);
}
