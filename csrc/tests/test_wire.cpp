// Control connections: digests of published vectors, handshakes, and what breaks them.
#include <utility>

#include "../sha256.h"
#include "../wire.h"
#include "check.h"

using namespace spotspeed;
using namespace spotspeed::control;

namespace {

std::string hex(const std::string& bytes) {
  constexpr const char* kDigits = "0123456789abcdef";
  std::string text;
  for (const char byte : bytes) {
    text += kDigits[static_cast<unsigned char>(byte) >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

// Two sides of a connection; `pass` carries what both want to say until nobody does.
struct Pair {
  Pair(const std::string& one_secret, const std::string& other_secret)
      : one(one_secret, 1, 4, 0), other(other_secret, 0, 4, std::nullopt) {}

  std::vector<Frame> pass() {
    std::vector<Frame> heard;
    while (!one.outgoing.empty() || !other.outgoing.empty()) {
      const std::string to_other = std::exchange(one.outgoing, {});
      const std::string to_one = std::exchange(other.outgoing, {});
      for (Frame& frame : other.feed(to_other)) heard.push_back(std::move(frame));
      for (Frame& frame : one.feed(to_one)) heard.push_back(std::move(frame));
    }
    return heard;
  }

  Session one, other;
};

}  // namespace

TEST(digests_are_those_of_the_standard) {
  // FIPS 180-4 examples, and RFC 4231 test cases 2 and 6.
  Sha256 hash;
  hash.add("abc");
  CHECK(hex(hash.digest()) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  Sha256 million;
  for (int i = 0; i < 1000; ++i) million.add(std::string(1000, 'a'));
  CHECK(hex(million.digest()) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  CHECK(hex(hmac_sha256("Jefe", {"what do ya want ", "for nothing?"})) ==
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  CHECK(hex(hmac_sha256(std::string(131, '\xaa'),
                        {"Test Using Larger Than Block-Size Key - Hash Key First"})) ==
        "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

TEST(both_sides_know_each_other_and_talk) {
  Pair pair("secret", "secret");
  pair.pass();
  CHECK(pair.one.is_authenticated() && pair.other.is_authenticated() && pair.other.peer() == 1);
  pair.one.queue(FrameKind::kMessage, "hello");
  pair.other.queue(FrameKind::kGoodbye);
  const std::vector<Frame> heard = pair.pass();
  CHECK(heard.size() == 2 && heard[0].payload == "hello");
  CHECK(heard[1].kind == FrameKind::kGoodbye);
}

TEST(a_stranger_gets_no_further_than_the_challenge) {
  Pair pair("secret", "another");
  CHECK(check::throws<WireError>([&] { pair.pass(); }));
  CHECK(!pair.other.is_authenticated());
  Session target("secret", 0, 4, std::nullopt);
  CHECK(check::throws<WireError>([&] { target.feed("GET / HTTP/1.1\r\n"); }));
}

TEST(a_changed_or_repeated_frame_is_noticed) {
  for (const bool is_repeated : {false, true}) {
    Pair pair("secret", "secret");
    pair.pass();
    pair.one.queue(FrameKind::kMessage, "pay 1");
    std::string data = std::exchange(pair.one.outgoing, {});
    if (is_repeated) {
      data += data;
    } else {
      data[6] ^= 1;
    }
    CHECK(check::throws<WireError>([&] { pair.other.feed(data); }));
  }
}

TEST(frames_arrive_in_any_pieces) {
  Pair pair("secret", "secret");
  pair.pass();
  pair.one.queue(FrameKind::kMessage, std::string(1000, 'x'));
  pair.one.queue(FrameKind::kMessage);
  const std::string data = std::exchange(pair.one.outgoing, {});
  std::size_t count = 0;
  for (const char byte : data) count += pair.other.feed({&byte, 1}).size();
  CHECK(count == 2);
}

TEST_MAIN
