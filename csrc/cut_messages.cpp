#include "cut_messages.h"

#include <cmath>
#include <type_traits>

#include "msgpack.h"

namespace spotspeed::cut {
namespace {

constexpr std::size_t kMaxMessageBytes = std::size_t{64} << 20;
constexpr double kMaxSeconds = 1e12;

using msgpack::Malformed;
using msgpack::Reader;
using msgpack::Writer;

template <typename T>
void write(Writer& to, const T& value);

template <typename Struct>
void write_fields(Writer& to, const Struct& value) {
  std::apply([&to](const auto&... field) { (write(to, field), ...); }, value.fields());
}

template <typename Struct>
constexpr std::size_t field_count() {
  return std::tuple_size_v<decltype(std::declval<const Struct&>().fields())>;
}

void put(Writer& to, std::int64_t value) { to.integer(value); }
void put(Writer& to, bool value) { to.boolean(value); }
void put(Writer& to, double value) { to.real(value); }
void put(Writer& to, const Blob& value) { to.binary(value.bytes); }
void put(Writer& to, const std::string& value) {
  to.text(msgpack::first_code_points(value, kMaxTextCodePoints));
}

template <typename T>
void put(Writer& to, const std::optional<T>& value) {
  if (value) {
    write(to, *value);
  } else {
    to.nil();
  }
}

template <typename T>
void put(Writer& to, const std::vector<T>& values) {
  to.array(values.size());
  for (const T& value : values) write(to, value);
}

template <typename T>
void write(Writer& to, const T& value) {
  if constexpr (std::is_enum_v<T>) {
    to.integer(static_cast<std::int64_t>(value));
  } else if constexpr (std::is_same_v<T, Cut> || std::is_same_v<T, RoundView>) {
    to.array(field_count<T>());
    write_fields(to, value);
  } else {
    put(to, value);
  }
}

template <typename T>
void read(Reader& from, T& value);

template <typename Struct>
void read_fields(Reader& from, Struct& value) {
  std::apply([&from](auto&... field) { (read(from, field), ...); }, value.fields());
}

void get(Reader& from, std::int64_t& value) {
  value = from.integer();
  if (value < 0) throw Malformed("expected an integer from 0 to 2**63 - 1");
}
void get(Reader& from, bool& value) { value = from.boolean(); }
void get(Reader& from, double& value) {
  value = from.real();
  if (!(std::fabs(value) < kMaxSeconds)) throw Malformed("expected seconds");
}
void get(Reader& from, Blob& value) { value.bytes = from.binary(); }
void get(Reader& from, std::string& value) {
  value = from.text();
  if (value.size() > kMaxTextCodePoints &&
      msgpack::count_code_points(value) > kMaxTextCodePoints) {
    throw Malformed("expected a shorter text");
  }
}

template <typename T>
void get(Reader& from, std::optional<T>& value) {
  if (from.nil()) return value.reset();
  read(from, value.emplace());
}

template <typename T>
void get(Reader& from, std::vector<T>& values) {
  // Grown as elements come: a count alone must not cost memory.
  for (std::size_t count = from.array(); count > 0; --count) read(from, values.emplace_back());
}

template <typename Enum>
void get_enum(Reader& from, Enum& value, std::int64_t first, std::int64_t last) {
  std::int64_t number = 0;
  get(from, number);
  if (number < first || number > last) throw Malformed(std::to_string(number) + " has no meaning");
  value = static_cast<Enum>(number);
}
void get(Reader& from, Phase& value) { get_enum(from, value, 0, 7); }
void get(Reader& from, Wish& value) { get_enum(from, value, 1, 3); }

template <typename T>
void read(Reader& from, T& value) {
  if constexpr (std::is_same_v<T, Cut> || std::is_same_v<T, RoundView>) {
    if (from.array() != field_count<T>()) throw Malformed("a wrong number of fields");
    read_fields(from, value);
  } else {
    get(from, value);
  }
}

template <std::size_t Code = 1>
Message read_message(Reader& from, std::int64_t code, std::size_t count) {
  if constexpr (Code <= std::variant_size_v<Message>) {
    if (code != static_cast<std::int64_t>(Code)) return read_message<Code + 1>(from, code, count);
    std::variant_alternative_t<Code - 1, Message> message;
    if (count != field_count<decltype(message)>()) throw Malformed("a wrong number of fields");
    read_fields(from, message);
    return message;
  } else {
    throw Malformed("message code " + std::to_string(code) +
                    " is unknown; are all ranks of one version of spotspeed?");
  }
}

}  // namespace

std::string encode(const Term& term, const Message& message) {
  Writer to;
  std::visit(
      [&](const auto& body) {
        to.array(3 + field_count<std::decay_t<decltype(body)>>());
        to.integer(static_cast<std::int64_t>(message.index()) + 1);
        write_fields(to, term);
        write_fields(to, body);
      },
      message);
  return to.take();
}

std::pair<Term, Message> decode(std::string_view data) {
  if (data.size() > kMaxMessageBytes) {
    throw FormatError("a message of " + std::to_string(data.size()) + " bytes, limit " +
                      std::to_string(kMaxMessageBytes));
  }
  try {
    Reader from(data);
    const std::size_t count = from.array();
    if (count < 3) throw Malformed("expected an array of three or more");
    const std::int64_t code = from.integer();
    Term term;
    read_fields(from, term);
    Message message = read_message(from, code, count - 3);
    from.end();
    return {term, std::move(message)};
  } catch (const Malformed& error) {
    throw FormatError(std::string("not a message: ") + error.what());
  }
}

}  // namespace spotspeed::cut
