// Carries cut messages of any size over a transport whose messages are small; coordinator/post.py.
//
// Lifetime: refers to the transport, which must outlive it.
// Threads: the transport's.
// Alignment: none required.
#pragma once

#include "cut_messages.h"
#include "sockets.h"

namespace spotspeed::control {

class Post {
 public:
  explicit Post(SocketTransport& transport) : transport_(transport) {}

  void send(Rank to, const cut::Term& term, const cut::Message& message);
  // The message that `payload` completes, if it does. Throws cut::FormatError.
  std::optional<std::pair<cut::Term, cut::Message>> receive(Rank sender, std::string_view payload);

 private:
  SocketTransport& transport_;
  std::map<Rank, std::string> parts_;
};

}  // namespace spotspeed::control
