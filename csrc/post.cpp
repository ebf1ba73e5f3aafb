#include "post.h"

namespace spotspeed::control {
namespace {

// Below the transport's queue limit, or it would give up the receiver.
constexpr std::size_t kEncodedBytesMax = std::size_t{12} << 20;
constexpr std::size_t kPartBytes = kMaxMessageBytes - 1;
// The first byte of a part says whether more follow.
constexpr char kLast = 0, kMore = 1;

}  // namespace

void Post::send(Rank to, const cut::Term& term, const cut::Message& message) {
  const std::string data = cut::encode(term, message);
  std::size_t start = 0;
  for (; data.size() - start > kPartBytes; start += kPartBytes) {
    transport_.send(to, kMore + data.substr(start, kPartBytes));
  }
  transport_.send(to, kLast + data.substr(start));
}

std::optional<std::pair<cut::Term, cut::Message>> Post::receive(Rank sender,
                                                                std::string_view payload) {
  if (payload.empty() || (payload[0] != kLast && payload[0] != kMore)) {
    throw cut::FormatError("rank " + std::to_string(sender) + ": not a part of a message");
  }
  std::string& parts = parts_[sender];
  parts += payload.substr(1);
  if (parts.size() > kEncodedBytesMax) {
    throw cut::FormatError("rank " + std::to_string(sender) + ": a message of more than " +
                           std::to_string(kEncodedBytesMax) + " bytes");
  }
  if (payload[0] == kMore) return std::nullopt;
  const std::string data = std::move(parts);
  parts_.erase(sender);
  return cut::decode(data);
}

}  // namespace spotspeed::control
