#include "wire.h"

#include <cerrno>
#include <system_error>

#include <sys/random.h>

#include "sha256.h"

namespace spotspeed::control {
namespace {

constexpr std::string_view kMagic = "spotctl1";
constexpr std::size_t kNonceBytes = 16;
constexpr std::size_t kTagBytes = 16;
constexpr std::size_t kHeadBytes = 5;
constexpr std::size_t kHelloBytes = 8 + 4 + 4 + kNonceBytes;
constexpr std::size_t kChallengeBytes = kNonceBytes + kSha256Bytes;

void put(std::string& to, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) to.push_back(static_cast<char>(value >> (8 * i) & 0xff));
}

std::uint64_t get(std::string_view from, std::size_t at, int bytes) {
  std::uint64_t value = 0;
  for (int i = bytes - 1; i >= 0; --i) {
    value = value << 8 | static_cast<unsigned char>(from[at + static_cast<std::size_t>(i)]);
  }
  return value;
}

std::string fresh_nonce() {
  std::string nonce(kNonceBytes, '\0');
  ssize_t count = -1;
  do {
    count = getrandom(nonce.data(), nonce.size(), 0);
  } while (count < 0 && errno == EINTR);
  if (count != static_cast<ssize_t>(nonce.size())) {
    throw std::system_error(errno, std::generic_category(), "getrandom");
  }
  return nonce;
}

std::string tag(std::string_view key, std::uint64_t number, std::string_view head,
                std::string_view payload) {
  std::string counted;
  put(counted, number, 8);
  return hmac_sha256(key, {counted, head, payload}).substr(0, kTagBytes);
}

}  // namespace

Session::Session(std::string secret, Rank rank, Rank world_size, std::optional<Rank> target)
    : secret_(std::move(secret)),
      rank_(rank),
      world_size_(world_size),
      is_connector_(target.has_value()),
      peer_(target) {
  if (!target) return;
  transcript_ = kMagic;
  put(transcript_, static_cast<std::uint64_t>(rank), 4);
  put(transcript_, static_cast<std::uint64_t>(*target), 4);
  transcript_ += fresh_nonce();
  outgoing = transcript_;
  stage_ = Stage::kChallenge;
}

void Session::queue(FrameKind kind, std::string_view payload) {
  if (stage_ != Stage::kFrames) throw std::logic_error("no frames before the keys are known");
  std::string head;
  put(head, payload.size(), 4);
  head.push_back(static_cast<char>(kind));
  const std::string proof = tag(send_key_, sent_++, head, payload);
  outgoing += head;
  outgoing += payload;
  outgoing += proof;
}

std::vector<Frame> Session::feed(std::string_view data) {
  incoming_ += data;
  std::vector<Frame> frames;
  while (advance(frames)) {
  }
  incoming_.erase(0, consumed_);
  consumed_ = 0;
  return frames;
}

bool Session::advance(std::vector<Frame>& frames) {
  switch (stage_) {
    case Stage::kHello: return on_hello();
    case Stage::kChallenge: return on_challenge();
    case Stage::kResponse: return on_response();
    case Stage::kFrames: break;
  }
  std::optional<Frame> frame = next_frame();
  if (!frame) return false;
  is_authenticated_ = true;
  frames.push_back(std::move(*frame));
  return true;
}

bool Session::on_hello() {
  const std::string_view data = incoming();
  if (data.substr(0, 8) != kMagic.substr(0, data.size())) {
    throw WireError("not a spotspeed control connection");
  }
  if (data.size() < kHelloBytes) return false;
  if (data.size() > kHelloBytes) throw WireError("bytes before the challenge");
  transcript_ = take(kHelloBytes);
  const auto source = static_cast<Rank>(get(transcript_, 8, 4));
  const auto target = static_cast<Rank>(get(transcript_, 12, 4));
  if (target != rank_ || source >= world_size_ || source == rank_) {
    throw WireError("rank " + std::to_string(source) + " asks for rank " +
                    std::to_string(target) + "; this is rank " + std::to_string(rank_));
  }
  peer_ = source;
  std::string challenge = fresh_nonce();
  challenge += hmac_sha256(secret_, {"challenge", transcript_, challenge});
  transcript_ += challenge;
  outgoing += challenge;
  stage_ = Stage::kResponse;
  return true;
}

bool Session::on_challenge() {
  if (incoming().size() < kChallengeBytes) return false;
  const std::string challenge = take(kChallengeBytes);
  const std::string_view nonce = std::string_view(challenge).substr(0, kNonceBytes);
  const std::string expected = hmac_sha256(secret_, {"challenge", transcript_, nonce});
  if (!equal_in_constant_time(std::string_view(challenge).substr(kNonceBytes), expected)) {
    throw WireError("the acceptor does not know the job's secret");
  }
  transcript_ += challenge;
  outgoing += hmac_sha256(secret_, {"response", transcript_});
  begin_frames();
  return true;
}

bool Session::on_response() {
  if (incoming().size() < kSha256Bytes) return false;
  const std::string expected = hmac_sha256(secret_, {"response", transcript_});
  if (!equal_in_constant_time(take(kSha256Bytes), expected)) {
    throw WireError("the connector does not know the job's secret");
  }
  begin_frames();
  is_authenticated_ = true;
  queue(FrameKind::kHeartbeat);
  return true;
}

void Session::begin_frames() {
  send_key_ = hmac_sha256(secret_, {"connector to acceptor", transcript_});
  receive_key_ = hmac_sha256(secret_, {"acceptor to connector", transcript_});
  if (!is_connector_) send_key_.swap(receive_key_);
  stage_ = Stage::kFrames;
}

std::optional<Frame> Session::next_frame() {
  const std::string_view data = incoming();
  if (data.size() < kHeadBytes) return std::nullopt;
  const std::uint64_t length = get(data, 0, 4);
  const auto kind = static_cast<unsigned char>(data[4]);
  if (length > kMaxMessageBytes || kind > static_cast<unsigned>(FrameKind::kGoodbye)) {
    throw WireError("a frame of kind " + std::to_string(kind) + " with " +
                    std::to_string(length) + " bytes");
  }
  if (data.size() < kHeadBytes + length + kTagBytes) return std::nullopt;
  const std::string head = take(kHeadBytes);
  Frame frame{static_cast<FrameKind>(kind), take(length)};
  const std::string expected = tag(receive_key_, received_, head, frame.payload);
  if (!equal_in_constant_time(take(kTagBytes), expected)) {
    throw WireError("a frame that is not authentic");
  }
  ++received_;
  return frame;
}

std::string Session::take(std::size_t count) {
  std::string taken(incoming().substr(0, count));
  consumed_ += count;
  return taken;
}

}  // namespace spotspeed::control
