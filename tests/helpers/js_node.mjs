// A real node of js-ipfs with its RPC, /api/v0, on loopback: node js_node.mjs REPO. It prints a line of JSON when it answers.
Promise.withResolvers ??= function () { // Node 20 does not have it yet
  let resolve, reject
  const promise = new Promise((one, other) => { resolve = one; reject = other })
  return { promise, resolve, reject }
}
const { create } = await import('ipfs-core')
const { HttpApi } = await import('ipfs-http-server')
const none = { Enabled: false }
const ipfs = await create({
  repo: process.argv[2],
  silent: true,
  preload: { enabled: false },
  init: { emptyRepo: true, algorithm: 'Ed25519' },
  EXPERIMENTAL: { pubsub: false },
  libp2p: { nat: { enabled: false }, relay: { enabled: false, hop: { enabled: false } }, peerDiscovery: [] },
  config: {
    Addresses: { Swarm: ['/ip4/127.0.0.1/tcp/0'], API: '/ip4/127.0.0.1/tcp/0', Gateway: '' },
    Bootstrap: [],
    Discovery: { MDNS: none, webRTCStar: none },
    Routing: { Type: 'none' }
  }
})
const api = new HttpApi(ipfs)
await api.start()
const addresses = (await ipfs.id()).addresses.map(String)
console.log(JSON.stringify({ url: api._apiServers[0].info.uri, address: addresses[0] }))
