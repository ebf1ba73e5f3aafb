// The control thread and its transport in Python; see spotspeed/coordinator/native.py.
//
// News are tuples (at_s, name, field, ...). A forked child abandons the objects and leaks them.
#include <array>
#include <memory>
#include <string>

#include <fcntl.h>

#include "bindings_fields.h"
#include "bindings_unlocked.h"
#include "control.h"

namespace py = pybind11;
using namespace spotspeed;
using control::Control;
using control::SocketTransport;

namespace {

// Owns `Object` until it is handed on or abandoned.
template <typename Object>
struct Holder {
  std::unique_ptr<Object> held;

  Object& get() const {
    if (held == nullptr) throw std::runtime_error("handed on, or left behind by a fork");
    return *held;
  }
  void abandon() {
    if (held == nullptr) return;
    held->abandon();
    // Its thread does not run here and its locks may be taken: nothing may be destroyed.
    static_cast<void>(held.release());
  }
  ~Holder() {
    const Unlocked unlocked;
    held.reset();
  }
};
using Transport = Holder<SocketTransport>;
using Thread = Holder<Control>;

constexpr const char* kNewsNames[] = {"Decided",   "Capture", "Settled",   "Departed", "PeerLost",
                                      "AllClosed", "Exchanged", "Noticed", "MustLeave", "Ended"};

using Routes = std::vector<std::pair<std::vector<std::string>, int>>;

std::unique_ptr<Transport> make_transport(std::int64_t rank, const py::bytes& secret, int listener,
                                          const Routes& routes, double peer_timeout_s) {
  SocketTransport::Setup setup;
  setup.rank = rank;
  setup.secret = secret;
  setup.peer_timeout_s = peer_timeout_s;
  for (const auto& [hosts, port] : routes) setup.routes.push_back({hosts, port});
  Descriptor own(listener);
  auto made = std::make_unique<Transport>();
  made->held = std::make_unique<SocketTransport>(std::move(setup), std::move(own));
  return made;
}

py::list handle(Transport& transport) {
  std::vector<control::TransportEvent> events;
  {
    const Unlocked unlocked;
    events = transport.get().handle();
  }
  py::list found;
  for (const control::TransportEvent& event : events) {
    if (const auto* received = std::get_if<control::Received>(&event)) {
      found.append(py::make_tuple(received->sender, py::bytes(received->payload)));
    } else {
      const auto& down = std::get<control::PeerDown>(event);
      found.append(py::make_tuple(down.rank, down.why, down.is_orderly));
    }
  }
  return found;
}

py::list take(Thread& thread) {
  py::list found;
  for (const control::Told& told : thread.get().take()) {
    const char* name = kNewsNames[told.news.index()];
    found.append(py::make_tuple(told.at_s, name) +
                 std::visit([](const auto& body) { return fields_of(body); }, told.news));
  }
  return found;
}

cut::Wish to_wish(int wish) {
  if (wish < 1 || wish > 3) throw py::value_error("a wish is 1, 2 or 3");
  return static_cast<cut::Wish>(wish);
}

std::unique_ptr<Thread> make_thread(Transport& transport, const std::array<double, 7>& timing,
                                    double unix_offset_s, const py::tuple& signals,
                                    const std::array<double, 2>& grace, int durable_code) {
  Control::Setup setup;
  setup.machine.rank = transport.get().rank();
  setup.machine.world_size = transport.get().world_size();
  setup.machine.timing = {timing[0], timing[1], timing[2], timing[3],
                          timing[4], timing[5], timing[6]};
  setup.machine.unix_offset_s = unix_offset_s;
  setup.signals.read_fd = signals[0].cast<int>();
  setup.signals.forward_fd = signals[1].cast<int>();
  setup.signals.names = signals[2].cast<std::map<int, std::string>>();
  setup.signals.seconds_left = signals[3].cast<double>();
  setup.grace_s = grace[0];
  setup.stuck_s = grace[1];
  setup.durable_code = durable_code;
  auto made = std::make_unique<Thread>();
  made->held = std::make_unique<Control>(std::move(transport.held), std::move(setup));
  return made;
}

void bind_transport(py::module_& module) {
  using Release = py::call_guard<Unlocked>;
  py::class_<Transport>(module, "SocketTransport")
      .def(py::init(&make_transport), py::arg("rank"), py::arg("secret"), py::arg("listener"),
           py::arg("routes"), py::arg("peer_timeout_s"))
      .def("fileno", [](Transport& t) { return t.get().fileno(); })
      .def("wait_s", [](Transport& t) { return t.get().wait_s(); })
      .def("connect", [](Transport& t, std::int64_t to) { t.get().connect(to); }, Release())
      .def("send", [](Transport& t, std::int64_t to,
                      const std::string& payload) { t.get().send(to, payload); })
      .def("handle", &handle)
      .def("establish_some",
           [](Transport& t, double wait_s) { return t.get().establish_some(wait_s); }, Release())
      .def("wake_if_heard", [](Transport& t) { t.get().wake_if_heard(); })
      .def("close",
           [](Transport& t, double drain_s) {
             // What was handed on is its thread's to close.
             if (t.held != nullptr) t.held->close(drain_s);
           },
           Release())
      .def("abandon", &Transport::abandon);
}

}  // namespace

void bind_control(py::module_& module) {
  using Release = py::call_guard<Unlocked>;
  bind_transport(module);
  // What the gate needs is done with the GIL: taking it again would cost more than the call.
  py::class_<Thread>(module, "ControlThread")
      .def(py::init(&make_thread), py::arg("transport"), py::arg("timing"),
           py::arg("unix_offset_s"), py::arg("signals"), py::arg("grace"),
           py::arg("durable_code"))
      .def("pass_gate", [](Thread& t, std::int64_t position) { return t.get().pass(position); })
      .def("enter", [](Thread& t, std::int64_t position) { return t.get().enter(position); })
      .def("completed", [](Thread& t, std::int64_t position) { t.get().completed(position); })
      .def("notice", [](Thread& t, int wish, cut::OptionalTime left,
                        const std::string& source) { t.get().notice(to_wish(wish), left, source); })
      .def("staged", [](Thread& t, std::int64_t round) { t.get().staged(round); })
      .def("durable", [](Thread& t, std::int64_t round,
                         cut::OptionalText digest) { t.get().durable(round, std::move(digest)); })
      .def("failed", [](Thread& t, std::int64_t round,
                        const std::string& why) { t.get().failed(round, why); })
      .def("delivered", [](Thread& t, std::int64_t round) { t.get().delivered(round); })
      .def("gather", [](Thread& t, std::string label, const py::bytes& value) {
        t.get().gather(std::move(label), {std::string(value)});
      })
      .def("missing", [](Thread& t) { return t.get().missing(); })
      .def("has_lost", [](Thread& t) { return t.get().has_lost(); })
      .def("is_ending", [](Thread& t) { return t.get().is_ending(); })
      .def("event_fd", [](Thread& t) { return t.get().event_fd(); })
      .def("take", &take)
      .def("reached", [](Thread& t) { t.get().reached(); })
      .def("remember_newest",
           [](Thread& t, std::string words) { t.get().remember_newest(std::move(words)); })
      .def("wake", [](Thread& t) { t.get().wake(); })
      .def("stop", [](Thread& t, double drain_s) { t.get().stop(drain_s); }, Release())
      .def("abandon", &Thread::abandon);
}
