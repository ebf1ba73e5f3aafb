// One side of one control connection: bytes in, frames and bytes out; coordinator/wire.py.
//
// The handshake and the frames are those that spotspeed/coordinator/wire.py documents.
//
// Lifetime: plain values that own all they hold.
// Threads: one thread an object.
// Alignment: none required.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace spotspeed::control {

using Rank = std::int64_t;

constexpr std::size_t kMaxMessageBytes = std::size_t{1} << 20;

enum class FrameKind : unsigned char { kHeartbeat = 0, kMessage = 1, kGoodbye = 2 };

struct Frame {
  FrameKind kind = FrameKind::kHeartbeat;
  std::string payload;
};

// The other side broke the protocol or is not of this job.
class WireError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Session {
 public:
  // `target` is the rank that is being connected to, or nothing on the accepting side.
  Session(std::string secret, Rank rank, Rank world_size, std::optional<Rank> target);

  // Bytes to be written; whoever writes removes them.
  std::string outgoing;

  // On the accepting side known once it is authenticated (or claims to be somebody).
  std::optional<Rank> peer() const { return peer_; }
  bool is_authenticated() const { return is_authenticated_; }
  bool is_connector() const { return is_connector_; }
  // Whether this side has proved itself: the other may believe it connected.
  bool has_answered() const { return stage_ == Stage::kFrames; }
  // Appends one frame to `outgoing`; only once the keys are known.
  void queue(FrameKind kind, std::string_view payload = {});
  // Takes received bytes; returns the frames that are now complete. Throws WireError.
  std::vector<Frame> feed(std::string_view data);

 private:
  enum class Stage { kHello, kChallenge, kResponse, kFrames };
  bool advance(std::vector<Frame>& frames);
  bool on_hello();
  bool on_challenge();
  bool on_response();
  std::optional<Frame> next_frame();
  void begin_frames();
  std::string take(std::size_t count);
  std::string_view incoming() const { return std::string_view(incoming_).substr(consumed_); }

  const std::string secret_;
  const Rank rank_, world_size_;
  const bool is_connector_;
  std::optional<Rank> peer_;
  bool is_authenticated_ = false;
  Stage stage_ = Stage::kHello;
  std::string incoming_;
  std::size_t consumed_ = 0;
  std::string transcript_, send_key_, receive_key_;
  std::uint64_t sent_ = 0, received_ = 0;
};

}  // namespace spotspeed::control
